"""An autoencoder's files, ours and other programs': a module for each family of formats.

A family has two functions. `recognises(found)` says whether what lies at a path is of its kind, by names, headers and
configs. `read(found, given)` returns what is there by name, as `Loaded`s: configs in our vocabulary, and weights that
are read when they are asked for. Nothing that a file holds is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_from_dict
from sae_training.config.placement import devices_of
from sae_training.config.types import WITH_K
from sae_training.formats import native
from sae_training.formats.chosen import the_one
from sae_training.formats.doubts import blamed_on, check_finite, printable, swapped_axes
from sae_training.formats.families import FAMILIES, is_one, unknown
from sae_training.formats.folders import look_below, names_below
from sae_training.formats.found import Found, without_ending
from sae_training.formats.hook_names import transformer_lens_name
from sae_training.formats.loaded import Facts, Given, Loaded, completed
from sae_training.machine.device import checked, is_there

__all__ = [
    "Facts", "Given", "Loaded", "blamed_on", "config_at", "config_of", "load", "native", "read", "read_many",
    "the_crosscoder", "warn_of", "weights_of",
]  # fmt: skip


def read(path: Path, given: Given = Given()) -> dict[str, Loaded]:  # noqa: B008 - it is frozen
    """All autoencoders of a file or folder, by name, at the places that the files name.

    Where the caller names a place, a folder of several is all that lie below it. Raise ValueError or OSError if no
    family can read it.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint folder, or a .safetensors, .npz, "
            ".pt, .pth, .pkl or .pkl.gz."
        )
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: neither a file nor a folder, but a device or a pipe; give a file.")
    found = Found(path)
    if given.names_a_place and found.is_folder and not is_one(found):
        return below(path, given)
    with blamed_on(path), others_named(path):
        for family in FAMILIES:
            if family.recognises(found):
                plain = given.without_place()
                ones = {name: completed(one, plain, path) for name, one in family.read(found, plain).items()}
                return {
                    name: dataclasses.replace(one, at=partial(read_again, family.read, found, name))
                    for name, one in ones.items()
                }
    raise ValueError(unknown(found))


def read_again(read_family: Callable[..., dict[str, Loaded]], found: Found, name: str, given: Given) -> Loaded:
    """The autoencoder of this name, at the place that the caller names if the files name none."""
    with blamed_on(found.path):
        return completed(read_family(found, given)[name], given, found.path)


@contextlib.contextmanager
def others_named(path: Path) -> Iterator[None]:
    """Say in an error that there is no autoencoder at `path` which ones lie below it."""
    try:
        yield
    except native.NoWeights as error:
        there = names_below(path)
        if not there:
            raise
        shown = ", ".join([*there[:8], "..."][: len(there)])
        raise FileNotFoundError(
            f"{path}: is no autoencoder itself, but below it there are {shown}; give the path of one, or its "
            "hook_point or layer, or call load_many."
        ) from error


def read_many(path: Path, given: Given) -> dict[str, Loaded]:
    """All of `below`. ValueError for an argument that changes nothing in any of them."""
    found = below(path, given)
    check_used(found.values(), given, path)
    return found


def below(path: Path, given: Given) -> dict[str, Loaded]:
    """The autoencoders of a file of several, or of a folder and all folders below it, by their paths from there.

    One that cannot be read is there too, with its problem, unless there is no other: then it is raised. Files that
    cannot be opened, of which nothing tells whether they are autoencoders, and folders too deep are warned of.
    """
    if not path.is_dir() or is_one(Found(path)):
        return read(path, given)
    looked = look_below(path)
    too_deep = looked.why_not_into(path)
    found: dict[str, Loaded] = {}
    problem: Exception | None = None
    for one in looked.ones:
        place = one.relative_to(path)
        name = place.as_posix() if one.is_dir() else place.with_name(without_ending(one)).as_posix()
        name = place.as_posix() if name in found else name  # of two endings
        try:
            inside = read(one, given.without_place())
        except (ValueError, OSError) as error:
            problem = problem or error
            inside = {name: Loaded({}, dict, problem=str(error))}
        for inner, loaded in inside.items():
            found[name if len(inside) == 1 else f"{name}/{inner}"] = loaded
    if not found:
        raise looked.nothing(path)
    if problem is not None and all(loaded.problem for loaded in found.values()):
        raise ValueError(f"{problem}\n{too_deep}") from problem if too_deep else problem
    for told in filter(None, [looked.why_unreadable(path), too_deep]):
        warnings.warn(told, stacklevel=4)
    return found


def load(
    path: Path,
    device: str | None = None,
    given: Given = Given(),  # noqa: B008
) -> tuple[LanguageModelSAERunnerConfig, dict[str, Tensor]]:
    """Config and tensors of the autoencoder at `path`; of several, the one that `given` names.

    The config's device is `device`, or the saved one if it is there. So is its device_map.
    """
    found = read(path, given)
    (one, *others) = found.values() if found else (None,)
    loaded = one if one is not None and not others and one.is_crosscoder else the_one(found, path, given)
    check_used([loaded], given, path)
    return config_of(loaded, path, device), weights_of(loaded, path)


def config_at(path: Path, given: Given) -> LanguageModelSAERunnerConfig:
    """The config that `load` gives, of which no weight is read."""
    loaded = the_one(read(path, given), path, given)
    check_used([loaded], given, path)
    return config_of(loaded, path)


def the_crosscoder(path: Path, given: Given) -> Loaded:
    """The crosscoder at `path`. ValueError if another thing lies there."""
    found = read(path, given)
    if len(found) != 1 or not (loaded := next(iter(found.values()))).is_crosscoder:
        shown = ", ".join([*list(found)[:8], "..."][: len(found)])
        raise ValueError(
            f"{path}: no crosscoder, but autoencoders of one place ({shown}); load them with "
            "SparseAutoencoder.load_from_pretrained or load_many."
        )
    check_used([loaded], given, path)
    return loaded


def check_used(ones: Iterable[Loaded], given: Given, path: Path) -> None:
    """ValueError for an argument that changes nothing in any of them. (One that cannot be read may take it.)"""
    read_ones = list(ones)
    if any(one.problem is not None for one in read_ones):
        return
    for name in ("k", "norm_factor", "target_hook_point", "context_size", "hook_point", "layer"):
        if (value := getattr(given, name)) is None or any(is_used(one, name, value) for one in read_ones):
            continue
        told = [one for one in read_ones if name != "k" or one.values.get("architecture") in WITH_K]
        stated = {str(one.values.get(name)) for one in told} - {"None"}
        why = f"as the files say {', '.join(sorted(stated))}" if stated else "as these files take none"
        raise ValueError(f"{path}: {name}: found {value!r}, expected nothing, {why}; leave it out.")


def is_used(loaded: Loaded, name: str, value: Any) -> bool:
    """Whether an argument says something of what was read: it is taken, or is what the files say themselves."""
    values = loaded.values
    if name == "norm_factor":
        return loaded.takes_norm_factor
    if loaded.is_crosscoder:
        return name == "k" and values.get("k") is not None
    if name == "k":
        return values.get("architecture") in WITH_K and values.get("k") == value
    if name == "target_hook_point":
        return values.get("target_hook_point") in (value, transformer_lens_name(value, values.get("model_name")))
    return True  # a context_size, and places, which `the_one` compares


def warn_of(loaded: Loaded, path: Path) -> None:
    """Its remarks as warnings."""
    for remark in loaded.remarks:
        warnings.warn(f"{path}: {printable(remark)}", stacklevel=5)


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
    """The config of what was read, for `device`, after its remarks as warnings. ValueError if it is none."""
    if loaded.problem is not None:
        raise ValueError(loaded.problem)
    if loaded.is_crosscoder:
        kind = str(loaded.values["architecture"]).replace("_", "-", 1).replace("_", " ")
        raise ValueError(
            f"{path}: a {kind}, whose latents read or write several places; load it with "
            "Crosscoder.load_from_pretrained of sae_training.sparse_autoencoder. It is not trained here."
        )
    warn_of(loaded, path)
    with blamed_on(path):
        cfg = config_from_dict(loaded.values, strict=False)
    if cfg.normalize_activations == "expected_average_only_in":
        raise ValueError(
            f"{path}: its config has normalize_activations {cfg.normalize_activations!r}, so its weights expect scaled "
            "activations by a factor that it does not hold; give norm_factor=..."
        )
    if device is None:
        device = cfg.device if is_there(cfg.device) else "cpu"
    are_there = all(map(is_there, devices_of(cfg.device_map)))
    return dataclasses.replace(cfg, device=str(checked(device)), device_map=cfg.device_map if are_there else None)
