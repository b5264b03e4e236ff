"""An autoencoder's files, ours and other programs': a module for each family of formats.

A family has two functions. `recognises(found)` says whether what lies at a path is of its kind, by names, headers and
configs. `read(found, given)` returns what is there by name, as `Loaded`s: configs in our vocabulary, and weights that
are read when they are asked for. Nothing that a file holds is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_from_dict
from sae_training.config.types import UNKNOWN, WITH_K
from sae_training.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    e2e_sae,
    gemma_crosscoders,
    gemma_scope,
    llama_scope,
    llamascopium_crosscoders,
    mats,
    model_diffing,
    native,
    openai,
    refused,
    saelens,
    single_files,
    sparsify,
)
from sae_training.formats.doubts import blamed_on, check_finite, printable, swapped_axes
from sae_training.formats.found import PICKLES, Found
from sae_training.formats.hook_names import layer_of, transformer_lens_name
from sae_training.formats.loaded import Facts, Given, Loaded, completed, describe
from sae_training.machine.device import checked, is_there

__all__ = [
    "Facts", "Given", "Loaded", "blamed_on", "config_at", "config_of", "load", "native", "read", "read_many",
    "the_crosscoder", "warn_of", "weights_of",
]  # fmt: skip

FAMILIES = (
    gemma_crosscoders,
    circuit_tracer_clt,
    llamascopium_crosscoders,
    model_diffing,
    gemma_scope,
    circuit_tracer,
    saelens,
    sparsify,
    dictionary_learning,
    openai,
    e2e_sae,
    llama_scope,
    single_files,
    refused,
    mats,
    native,
)
"""The first that recognises a thing reads it. native is the last: it says what is missing where there is nothing."""

ENDINGS = (*PICKLES, ".safetensors", ".npz")
MOST_FOLDERS = 20_000
MOST_LOOKED_AT = 200  # of the folders below one that is no autoencoder, for an error's message
DEEPEST = 6


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


def unknown(found: Found) -> str:
    """Say that no family reads what was found."""
    if found.is_pickle:
        held = describe(found.pickle())
        return f"{found.path}: found {held}, which no format that is read has; check the file."
    return f"{found.path}: unknown kind of file; expected .safetensors, .npz, .pt, .pth, .pkl or .pkl.gz."


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
        there: list[str] = []
        with contextlib.suppress(ValueError, OSError):
            folders = itertools.islice(folders_of(path), MOST_LOOKED_AT)
            there = [folder.relative_to(path).as_posix() for folder in folders if is_one(Found(folder))]
            there += [file.name for file in sorted(path.iterdir(), key=natural_order) if is_file_of_one(file)]
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

    One that cannot be read is there too, with its problem, unless there is no other: then it is raised.
    """
    if not path.is_dir() or is_one(Found(path)):
        return read(path, given)
    found: dict[str, Loaded] = {}
    problem: Exception | None = None
    whole: set[Path] = set()  # folders that are one autoencoder; the files below them are parts of it
    for folder in (path, *folders_of(path)):
        if folder != path and is_one_or_damaged(folder):
            whole.add(folder)
            ones = [(folder.relative_to(path), folder)]
        elif whole & {*folder.parents}:
            ones = []
        else:
            files = sorted((file for file in folder.iterdir() if is_file_of_one(file)), key=natural_order)
            ones = [(file.relative_to(path).with_name(without_ending(file)), file) for file in files]
        for place, one in ones:
            name = place.as_posix()
            try:
                inside = read(one, given.without_place())
            except (ValueError, OSError) as error:
                problem = problem or error
                inside = {name: Loaded({}, dict, problem=str(error))}
            for inner, loaded in inside.items():
                found[name if len(inside) == 1 else f"{name}/{inner}"] = loaded
    if problem is not None and all(loaded.problem for loaded in found.values()):
        raise problem
    if not found:
        raise FileNotFoundError(f"{path}: nothing in it is an autoencoder that is read; check the path.")
    return found


def without_ending(file: Path) -> str:
    """The file's name without the ending of its format: a.b-0.01.pkl.gz is a.b-0.01."""
    return next((file.name.removesuffix(ending) for ending in ENDINGS if file.name.endswith(ending)), file.name)


def is_one_or_damaged(folder: Path) -> bool:
    try:
        return is_one(Found(folder))
    except (ValueError, OSError):
        return True


def is_file_of_one(file: Path) -> bool:
    """Whether a file by itself is what a family reads. Files of other kinds, and unreadable ones, are none.

    It may be a link: the cache of the hub is made of them.
    """
    found = Found(file)
    if not file.name.endswith(ENDINGS) or not file.is_file():
        return False
    with contextlib.suppress(ValueError, OSError), blamed_on(file):
        others = (family for family in FAMILIES if family is not native)
        return native.is_whole(found) or any(family.recognises(found) for family in others)
    return False


def is_one(found: Found) -> bool:
    """Whether a folder itself holds what a family reads. (native takes every folder, to say what is missing.)"""
    with blamed_on(found.path):
        return native.holds_weights(found) or any(f.recognises(found) for f in FAMILIES if f is not native)


def load(
    path: Path,
    device: str | None = None,
    given: Given = Given(),  # noqa: B008
) -> tuple[LanguageModelSAERunnerConfig, dict[str, Tensor]]:
    """Config and tensors of the autoencoder at `path`; of several, the one that `given` names.

    The config's device is `device`, or the saved one if it is there.
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
    return dataclasses.replace(cfg, device=str(checked(device)))


# --------------------------------------------------------------------------------------------------------- one of many


def the_one(found: Mapping[str, Loaded], path: Path, given: Given) -> Loaded:
    """The only one that is at the place that `given` names, if it names one. ValueError that lists them otherwise.

    One whose files do not name its place is taken to be there if there is no other.
    """
    wanted = [loaded for loaded in found.values() if is_at(loaded, given)]
    if not wanted and len(found) == 1:
        wanted = [loaded for loaded in found.values() if is_at(loaded, given) is None]
    if len(wanted) == 1:
        return placed(wanted[0], given)
    unread = [(name, loaded.problem) for name, loaded in found.items() if loaded.problem is not None]
    places = [f"{name} ({place_in_words(loaded)})" for name, loaded in list(found.items())[:20]]
    shown = ", ".join([*places, "..."][: len(found)])
    raise ValueError(
        f"{path}: of the autoencoders there ({shown}) {len(wanted)} are at hook_point {given.hook_point}, layer "
        f"{given.layer}, expected one; change hook_point or layer, or call load_many."
        + "".join(f"\n{name} cannot be read: {problem}" for name, problem in unread[:5])
    )


def placed(loaded: Loaded, given: Given) -> Loaded:
    """What was chosen, at the place that `given` names where its files leave the place out."""
    is_known = loaded.values.get("hook_point") != UNKNOWN and "hook_point_layer" in loaded.values
    if not given.names_a_place or is_known or loaded.at is None:
        return loaded
    return dataclasses.replace(loaded.at(given), takes_norm_factor=loaded.takes_norm_factor)


def place_in_words(loaded: Loaded) -> str:
    if loaded.problem is not None:
        return "cannot be read"
    layer = loaded.values.get("hook_point_layer")
    place = loaded.values.get("hook_point")
    return f"{place} place of layer {layer}" if place == UNKNOWN and layer is not None else str(place)


def is_at(loaded: Loaded, given: Given) -> bool | None:
    """Whether an autoencoder is at the place that `given` names, by what its files say; None if they do not say it."""
    if not given.names_a_place:
        return True
    hook_point = str(loaded.values.get("hook_point", UNKNOWN))
    layer = layer_of(hook_point)
    layer = loaded.values.get("hook_point_layer") if layer is None else layer
    if hook_point == UNKNOWN:
        wanted = {given.layer, layer_of(given.hook_point or "")} - {None}
        return wanted == {layer} if wanted and layer is not None else None
    hook_points = (hook_point, hook_point.replace("{layer}", str(layer)))
    wanted_hook = given.hook_point and transformer_lens_name(given.hook_point, loaded.values.get("model_name"))
    if wanted_hook is not None and wanted_hook not in hook_points:
        return False
    return None if given.layer is not None and layer is None else given.layer in (None, layer)


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
