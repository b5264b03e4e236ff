"""TODO."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache import origin
from sae_training.activations_store.cache_writer import CacheWriter
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.io import FIELD_NAMES
from sae_training.config.sweep import variants, with_layers
from sae_training.language_model.compile import compile_blocks
from sae_training.language_model.load import LanguageModel, load_language_model
from sae_training.language_model.sites import find_sites, merged
from sae_training.machine.files import lock_beside
from sae_training.machine.interrupt import StopRequest
from sae_training.machine.paths import with_absolute_paths


def cache_activations_runner(
    cfg: CacheActivationsRunnerConfig, model: LanguageModel | None = None, dataset: Any = None
) -> Path:
    """Write what `cfg` describes, or go on with it, and return the folder. A finished cache is left as it is.

    `model` and `dataset` stand in for those that the config names.
    """
    run_cfg = with_absolute_paths(run_config_of(cfg))
    lm: LanguageModel = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype) if model is None else model
    compile_blocks(lm, cfg.compile_lm)
    run_cfg = with_layers(run_cfg, lm.cfg.n_layers)
    singles = list(variants(run_cfg).values())
    sites = merged(find_sites(single, lm) for single in singles)
    store = ActivationsStore(singles[0], lm, dataset, sites=sites, notify=tqdm.write)
    folder = Path(cfg.cached_activations_path).expanduser()
    with lock_beside(folder), StopRequest(tqdm.write) as stop:
        CacheWriter(cfg, folder, store, origin(run_cfg, lm, store.text.n_held_out)).write(stop)
    return folder


def run_config_of(cfg: CacheActivationsRunnerConfig) -> LanguageModelSAERunnerConfig:
    """A run config with the fields of `cfg` that runs have too: what the store asks for."""
    shared = {f.name for f in fields(cfg)} & set(FIELD_NAMES) - {"dtype", "cached_activations_path"}
    values = {name: getattr(cfg, name) for name in shared}
    try:
        return LanguageModelSAERunnerConfig(d_in=None, train_batch_size=1, n_batches_in_buffer=1, **values)
    except ValueError as error:
        raise ValueError(str(error).replace(LanguageModelSAERunnerConfig.__name__, type(cfg).__name__)) from error
