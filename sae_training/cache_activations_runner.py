"""Write the activations of a language model to disk, for training and for analysis."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache import origin
from sae_training.activations_store.cache_writer import CacheWriter
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.config.io import config_to_dict, with_defaults
from sae_training.config.sweep import variants, with_layers
from sae_training.language_model.compile import compile_blocks
from sae_training.language_model.load import LanguageModel, model_of
from sae_training.language_model.sites import find_sites, merged
from sae_training.machine.files import disk_named
from sae_training.machine.interrupt import StopRequest
from sae_training.machine.lock import lock_beside
from sae_training.machine.paths import with_absolute_paths
from sae_training.machine.phases import counted_phases, phase
from sae_training.machine.terminal import lasting
from sae_training.parallel.agreement import check_alike, code
from sae_training.parallel.ranks import is_first, joined, n_ranks
from sae_training.run.record import Record


@lasting()
@counted_phases()
def cache_activations_runner(
    cfg: CacheActivationsRunnerConfig, model: LanguageModel | None = None, dataset: Any = None
) -> Path:
    """Write what `cfg` describes, or go on with it, and return the folder. A finished cache is left as it is.

    `model` and `dataset` stand in for those that the config names. Processes under torchrun share the work.
    """
    with joined(with_defaults(cfg)):
        return write_cache(cfg, model, dataset)


def write_cache(cfg: CacheActivationsRunnerConfig, model: LanguageModel | None, dataset: Any) -> Path:
    with phase("loading the language model"):
        lm: LanguageModel = model_of(cfg, model)
    compile_blocks(lm, cfg.compile_lm)
    source = with_defaults(with_layers(with_absolute_paths(cfg), lm.cfg.n_layers))
    singles = list(variants(source).values())
    sites = merged(find_sites(single, lm) for single in singles)
    with phase("reading the text"):
        store = ActivationsStore(singles[0], lm, dataset, sites=sites, notify=tqdm.write)
    check_alike(config_to_dict(cfg) | {"the text": store.text.documents.start(), "the package's code": code()})
    folder = Path(cfg.cached_activations_path).expanduser()
    then = f"Once there is room, the same command continues {folder}."
    with (
        counted_phases() as phases,
        lock_beside(folder, "cached_activations_path") if is_first() else contextlib.nullcontext(),
        disk_named(folder, then=then),
        StopRequest(tqdm.write, by_agreement=n_ranks() > 1) as stop,
    ):
        writer = CacheWriter(cfg, folder, store, origin(source, lm, store.text.n_held_out))
        with Record(folder, "cache") as record:
            writer.write(stop, record.progress)
    store.text.say_skipped()
    tqdm.write(phases.line())
    return folder
