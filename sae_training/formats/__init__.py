"""An autoencoder's files, ours and other programs': a module for each family of formats.

A family has two functions. `recognises(found)` says whether what lies at a path is of its kind, by names, headers and
configs. `read(found, given)` returns what is there by name, as `Loaded`s: configs in our vocabulary, and weights that
are read when they are asked for. Nothing that a file holds is executed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_from_dict
from sae_training.formats import dictionary_learning, mats, native, saelens, sparsify
from sae_training.formats.doubts import blamed_on, check_finite, swapped_axes
from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of
from sae_training.formats.loaded import Facts, Given, Loaded
from sae_training.machine.device import checked, is_there

__all__ = ["Facts", "Given", "Loaded", "blamed_on", "config_of", "load", "native", "read", "read_many", "weights_of"]

FAMILIES = (saelens, sparsify, dictionary_learning, mats, native)
"""The first that recognises a thing reads it. native is the last: it says what is missing where there is nothing."""

MOST_FOLDERS = 20_000
DEEPEST = 6


def read(path: Path, given: Given = Given()) -> dict[str, Loaded]:  # noqa: B008 - it is frozen
    """All autoencoders of a file or folder, by name. Raise ValueError or OSError if no family can read it."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint folder, a .safetensors, or an old "
            ".pt / .pkl.gz."
        )
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: neither a file nor a folder, but a device or a pipe; give a file.")
    found = Found(path)
    is_asked = given.hook_point is not None or given.layer is not None
    if is_asked and found.is_folder and not is_one(found):
        return read_many(path, given)
    with blamed_on(path):
        for family in FAMILIES:
            if family.recognises(found):
                return family.read(found, given)
    raise ValueError(f"{path}: unknown kind of file; expected .safetensors, .pt, .pkl or .pkl.gz.")


def read_many(path: Path, given: Given) -> dict[str, Loaded]:
    """The autoencoders of a file of several, or of a folder and all folders below it, by their paths from there."""
    if not path.is_dir() or is_one(Found(path)):
        return read(path, given)
    found: dict[str, Loaded] = {}
    for folder in folders_of(path):
        if is_one(Found(folder)):
            below = read(folder, given)
            name = folder.relative_to(path).as_posix()
            for inner, loaded in below.items():
                found[name if len(below) == 1 else f"{name}/{inner}"] = loaded
    if not found:
        raise FileNotFoundError(f"{path}: no folder in it holds an autoencoder; check the path.")
    return found


def is_one(found: Found) -> bool:
    """Whether a folder itself holds what a family reads. (native takes every folder, to say what is missing.)"""
    return native.holds_weights(found) or any(f.recognises(found) for f in FAMILIES if f is not native)


def load(
    path: Path,
    device: str | None = None,
    given: Given = Given(),  # noqa: B008
) -> tuple[LanguageModelSAERunnerConfig, dict[str, Tensor]]:
    """Config and tensors of the autoencoder at `path`; of several, the one that `given` names.

    The config's device is `device`, or the saved one if it is there.
    """
    loaded = the_one(read(path, given), path, given)
    cfg = config_of(loaded, path, device)
    for remark in loaded.remarks:
        warnings.warn(f"{path}: {remark}", stacklevel=3)
    return cfg, weights_of(loaded, path)


def weights_of(loaded: Loaded, path: Path) -> dict[str, Tensor]:
    """The tensors of what was read. ValueError if they cannot be read, or are no finite numbers."""
    with blamed_on(path):
        tensors = loaded.weights()
        check_finite(tensors)
        remark = None if loaded.values.get("target_hook_point") else swapped_axes(tensors)
    if remark:
        warnings.warn(f"{path}: {remark}", stacklevel=4)
    return tensors


def config_of(loaded: Loaded, path: Path, device: str | None = None) -> LanguageModelSAERunnerConfig:
    """The config of what was read, for `device`. ValueError if it is none."""
    with blamed_on(path):
        cfg = config_from_dict(loaded.values, strict=False)
    if cfg.normalize_activations == "expected_average_only_in":
        raise ValueError(
            f"{path}: its config has normalize_activations {cfg.normalize_activations!r}, so its weights expect scaled "
            "activations by a factor that it does not hold; fold the factor into the weights and set it to 'none'."
        )
    if device is None:
        device = cfg.device if is_there(cfg.device) else "cpu"
    return dataclasses.replace(cfg, device=str(checked(device)))


# --------------------------------------------------------------------------------------------------------- one of many


def the_one(found: Mapping[str, Loaded], path: Path, given: Given) -> Loaded:
    """The only one, or the only one at the place that `given` names. ValueError that lists them otherwise."""
    wanted = [loaded for loaded in found.values() if len(found) == 1 or is_at(loaded.values, given)]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(list(found)[:20]) + (", ..." if len(found) > 20 else "")
    raise ValueError(
        f"{path}: holds {len(found)} autoencoders, of which {len(wanted)} are wanted, expected one: {names}; give "
        "hook_point=... or layer=..., or call load_many."
    )


def is_at(values: Mapping[str, Any], given: Given) -> bool:
    """Whether an autoencoder is at the place that `given` names; at none if it names none."""
    hook_point = str(values.get("hook_point", ""))
    if given.hook_point is None and given.layer is None:
        return False
    layer = layer_of(hook_point)
    return given.hook_point in (None, hook_point) and given.layer in (
        None,
        values.get("hook_point_layer") if layer is None else layer,
    )


def folders_of(path: Path) -> Iterator[Path]:
    """The folders below `path`, nearest first, in the order of their names' numbers; links are not followed."""
    level, seen = [path], 0
    for _ in range(DEEPEST):
        below = [child for folder in level for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
        level = sorted(below, key=natural_order)
        seen += len(level)
        if seen > MOST_FOLDERS:
            raise ValueError(f"{path}: holds more than {MOST_FOLDERS:,} folders; give one further down.")
        yield from level


def natural_order(path: Path) -> list[tuple[int, str]]:
    """A key that puts layers.9 before layers.10."""
    digits = "".join(c if c.isdecimal() else " " for c in str(path)).split()
    return [(int(number), "") for number in digits] + [(0, str(path))]
