"""Configs that describe several autoencoders, by lists in some fields, and the single configs that they stand for.

A list in one field stands for one autoencoder per value, lists in several fields for each combination. Values that an
architecture does not use (k, or the weight of a penalty) make no further autoencoders.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, TypeVar

from sae_training.config.fields import OPTION_OF, Source
from sae_training.config.types import FIXED_K, LABELS

C = TypeVar("C", bound=Source)

MAX_COMBINATIONS = 4096


def listed_fields(cfg: Any) -> list[str]:
    """Return the fields that hold lists, in the order in which names have them."""
    return [name for name in LABELS if isinstance(getattr(cfg, name, None), (list, tuple))]


def is_several(cfg: Any) -> bool:
    """Return whether the config describes several autoencoders (a list of one value counts)."""
    return bool(listed_fields(cfg)) or getattr(cfg, "hook_point_layer", None) == "all"


def n_combinations(cfg: Any) -> int:
    """Return how many combinations the lists have, those that `variants` leaves out included."""
    return math.prod(len(getattr(cfg, name)) for name in listed_fields(cfg))


def with_layers(cfg: C, n_layers: int) -> C:
    """Return `cfg` with every `layer_stride`-th of a model's `n_layers` layers in place of hook_point_layer="all"."""
    if cfg.hook_point_layer != "all":
        return cfg
    layers: Any = list(range(0, n_layers, cfg.layer_stride))
    changed = copy.copy(cfg)
    changed.hook_point_layer, changed.layer_stride = layers, 1
    return changed


def variants(cfg: C) -> dict[str, C]:
    """Return the single configs, unchecked, by the names of their autoencoders: one named "" if nothing is listed.

    No field of a single config holds a list, and its architecture has all the options that it sets.
    """
    names = listed_fields(cfg)
    found: dict[str, C] = {}
    for values in itertools.product(*(getattr(cfg, name) for name in names)):
        single: Any = copy.copy(cfg)
        for name, value in zip(names, values, strict=True):
            setattr(single, name, value)
        idle = {"l1_coefficient" if getattr(single, "architecture", None) in FIXED_K else "k"}
        for name in idle & {*names}:
            setattr(single, name, getattr(cfg, name)[0])
        if "architecture" in names:  # options of one in the list are nothing to the others
            listed = {*getattr(cfg, "architecture")}  # noqa: B009 - a cache has none
            for name, architectures in OPTION_OF.items():
                if single.architecture not in architectures and {*architectures} & listed:
                    setattr(single, name, getattr(type(cfg), name))
        if "{layer}" in single.hook_point and {"hook_point", "hook_point_layer"} <= {*names}:
            idle.add("hook_point_layer")  # the hook's name has it
        labels = {name: LABELS[name] + shown(getattr(single, name)) for name in names}
        labels |= {"hook_point": single.hook_point.replace("{layer}", str(single.hook_point_layer))}
        parts = [labels[name] for name in names if name not in idle]
        found.setdefault("-".join(parts), single)
    return found


def shown(value: Any) -> str:
    """Return a value as names have it: 0.001, not 1e-3."""
    return f"{value:g}" if isinstance(value, float) else str(value)
