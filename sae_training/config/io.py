"""Configs as dicts of JSON types, and what is asked of stored ones: what is unknown, what differs, what is missing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from sae_training.config.cache import CacheActivationsRunnerConfig
from sae_training.config.checks import fields_marked, plain_values, retired, unknown_names
from sae_training.config.fields import Source
from sae_training.config.run import LanguageModelSAERunnerConfig
from sae_training.config.types import IDENTIFIES_CACHE, UNKNOWN, WATCHES

FIELD_NAMES = tuple(field.name for field in fields(LanguageModelSAERunnerConfig))

WATCHING_FIELDS = frozenset(fields_marked(LanguageModelSAERunnerConfig, WATCHES))
"""The fields that do not change the weights. n_eval_batches does: it decides which contexts are held out."""

CACHE_FIELDS = fields_marked(Source, IDENTIFIES_CACHE)
"""The fields that a cache and a run that trains on it must agree in."""


def config_to_dict(cfg: Any) -> dict[str, Any]:
    """Return the fields of a config of any kind in JSON types: dtype as "float32", tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain_values(cfg).items()}


def config_from_dict(values: Mapping[str, Any], strict: bool = True) -> LanguageModelSAERunnerConfig:
    """Return the run config that the values describe; fields that are not given take their defaults.

    Unknown keys raise ValueError, all at once. With strict=False they are dropped (`unknown_keys` lists them), for
    files that other programs wrote.
    """
    unknown = unknown_keys(values)
    if unknown and strict:
        raise ValueError("\n".join(unknown_names(unknown, FIELD_NAMES, "the config")))
    return LanguageModelSAERunnerConfig(**{n: v for n, v in values.items() if n not in unknown})


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that neither are nor were fields of the run config."""
    known = {*FIELD_NAMES, *retired(LanguageModelSAERunnerConfig)}
    return [str(name) for name in values if name not in known]


def config_differences(a: Any, b: Any, ignore: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return `{field: (value in a, value in b)}` for each field in which two run configs differ."""
    in_a, in_b = config_to_dict(a), config_to_dict(b)
    return {name: (in_a[name], in_b[name]) for name in FIELD_NAMES if name not in ignore and in_a[name] != in_b[name]}


def with_defaults(cfg: Any) -> LanguageModelSAERunnerConfig:
    """Return a run config as it is; of any other object, its attributes as a run config, unchecked.

    For the configs of caches and toy runs, of the mats era, and of notebooks, which are any object with some of the
    fields. A field that `cfg` lacks has its default, but widths are not guessed: d_in is None, and expansion_factor is
    what d_sae asks for.
    """
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        return cfg
    filled = copy.copy(_defaults())
    names = FIELD_NAMES
    if isinstance(cfg, CacheActivationsRunnerConfig):  # its dtype and folder are those of files that are to be written
        names = (*(field.name for field in fields(Source)), "device", "parallel_timeout_minutes")
    for name in names:
        if hasattr(cfg, name):
            setattr(filled, name, getattr(cfg, name))
    filled.d_in = getattr(cfg, "d_in", None)
    d_sae = getattr(cfg, "d_sae", None)
    if filled.d_in and d_sae and not hasattr(cfg, "expansion_factor"):
        filled.n_latents = d_sae
    return filled


def check_known(cfg: Any, **stand_ins: object) -> None:
    """Raise ValueError for a model, place or text that an autoencoder's files do not name, unless one stands in for it.

    `stand_ins` are objects by field (model_name=model); None stands in for nothing.
    """
    for name in ("model_name", "hook_point", "target_hook_point", "dataset_path"):
        if getattr(cfg, name, None) == UNKNOWN and stand_ins.get(name) is None:
            raise ValueError(f"{name}: the files ({cfg.file_format}) do not say it; give {name}=...")


@functools.cache
def _defaults() -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig()
