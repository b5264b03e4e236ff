"""The session loader: a trained autoencoder back together with its language model and its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.store import without_cache
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import check_known
from sae_training.formats.loaded import Facts
from sae_training.language_model.load import LanguageModel, model_of
from sae_training.language_model.sites import find_sites, with_widths
from sae_training.sparse_autoencoder import SparseAutoencoder

Session = tuple[LanguageModel, SparseAutoencoder, ActivationsStore]


class LMSparseAutoencoderSessionloader:
    """Builds (model, sparse_autoencoder, activations_loader) from a config, or from the files of a run.

    The activations loader starts at the beginning of the run's text: `get_batch_tokens()`, `get_activations(tokens)`,
    `next_batch()`. Its `held_out_tokens()` are text that training never saw.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def load_session(self, model: LanguageModel | None = None, dataset: Any = None) -> Session:
        """Return a session with a new, untrained autoencoder."""
        cfg = self.cfg
        model = model_of(cfg, model)
        if isinstance(cfg, LanguageModelSAERunnerConfig):
            cfg = with_widths(cfg, find_sites(cfg, model))
        return model, SparseAutoencoder(cfg), ActivationsStore(cfg, model, dataset)

    @classmethod
    def load_session_from_pretrained(
        cls,
        path: str | Path,
        device: str | None = None,
        model: LanguageModel | None = None,
        dataset: Any = None,
        hook_point: str | None = None,
        layer: int | None = None,
        **given: Unpack[Facts],
    ) -> Session:
        """Return the session of a run folder, a checkpoint folder, or the files of another program (`formats`).

        The saved config names the language model, the text and the device; `model`, `dataset` and `device` stand in for
        them. `hook_point`, `layer` and `given` are those of `SparseAutoencoder.load_from_pretrained`: files of other
        programs may leave out the model or the text, which is an error here. Without `device`, a saved device that this
        machine lacks becomes the CPU. The model is processed as in the run (`model_processing`): by default its
        residual stream is centred, and so are the rows that the autoencoder expects. To use it on the hidden states of
        transformers, subtract from each row its mean.
        """
        sae = SparseAutoencoder.load_from_pretrained(path, device, hook_point, layer, **given)
        check_known(sae.cfg, model_name=model, dataset_path=dataset)
        cfg = without_cache(sae.cfg)
        model = model_of(cfg, model)
        sites = find_sites(cfg, model, is_trained=True)
        return model, sae, ActivationsStore(with_widths(cfg, sites), model, dataset, sites=sites)
