"""What autoencoders lie at a path, told from names, headers and configs: no weight is read, and no model is loaded.

`inspect` gives plain data for JSON, `in_words` the same for people. What the files' weights hold: `weight_figures`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import UNKNOWN, WITH_K
from sae_training.formats import (
    ENDINGS,
    FAMILIES,
    config_of,
    folders_of,
    is_one,
    is_one_or_damaged,
    llama_scope,
    mats,
    native,
    refused,
    single_files,
    unknown,
)
from sae_training.formats.doubts import blamed_on
from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of, transformer_lens_name
from sae_training.formats.loaded import Given, Loaded, completed
from sae_training.formats.pickles import tensors_by_name
from sae_training.formats.told_in_words import in_json, in_words
from sae_training.formats.traps import traps
from sae_training.formats.weight_figures import figures

__all__ = ["in_json", "in_words", "inspect"]

PLACES = ("model_name", "hook_point", "target_hook_point", "dataset_path")

PICKLES_OF_FOLDERS = ("ae.pt", "cc_weights.pt")
MOST_FILES = 20_000

SAYS_WHAT_IT_IS = (
    "architecture", "d_in", "d_sae", "d_out", "k", "normalize_activations", "apply_b_dec_to_input", "activation_fn",
    "model_name", "model_processing", "hook_point", "hook_point_layer", "hook_point_head_index", "target_hook_point",
    "skip_connection", "matryoshka_widths", "dataset_path", "context_size", "prepend_bos", "exclude_special_tokens",
    "seqpos_slice", "file_format", "file_dtype", "residual_threshold", "max_iterations", "stop_on_duplicate_support",
)  # fmt: skip
"""The config fields that say what an autoencoder is; the others are of its training."""


ONLY_IN: dict[str, tuple[str, ...]] = {
    "k": WITH_K,
    "activation_fn": ("standard",),
    "residual_threshold": ("matching_pursuit",),
    "max_iterations": ("matching_pursuit",),
    "stop_on_duplicate_support": ("matching_pursuit",),
}


def inspect(path: Path, full: bool = False, **given: Any) -> dict[str, Any]:
    """{"path", "autoencoders": {name: what it is}, "not_read": {name: why}} of a file, a folder, or all below a folder.

    ValueError or OSError, with what to do, if nothing there is known. An autoencoder that is recognised and refused
    has the reason under "problem". `full` reads the weights too, a few megabytes at a time. `given`: what the files
    leave out, or which of several is meant, by the fields of `Given`.
    """
    wanted = Given(**given)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; check the path.")
    found: dict[str, Any] = {}
    not_read: dict[str, str] = {}
    all_places = list(places(path))
    for place in all_places:
        name = "." if place == path else place.relative_to(path).as_posix()
        try:
            with blamed_on(place):
                ones = inspect_one(Found(place), full, wanted, len(all_places) == 1)
        except (ValueError, OSError) as error:
            if place == path:
                raise
            not_read[name] = str(error)
            continue
        for inner, one in ones.items():
            found[name if len(ones) == 1 else f"{name}/{inner}"] = one
    if wanted.names_a_place:
        found = those_wanted(found, path, wanted)
    return {"path": str(path), "autoencoders": found, "not_read": not_read}


def those_wanted(found: Mapping[str, Any], path: Path, given: Given) -> dict[str, Any]:
    """The autoencoders at the place that `given` names, and those with a problem. ValueError if there are none."""
    wanted = {name: one for name, one in found.items() if is_wanted(one.get("config", {}), given)}
    if not wanted:
        shown = ", ".join([f"{name} ({one['config'].get('hook_point')})" for name, one in list(found.items())[:20]])
        raise ValueError(
            f"{path}: hook_point, layer: found {shown}, expected one at hook_point {given.hook_point}, layer "
            f"{given.layer}; change them, or leave them out."
        )
    return wanted


def places(path: Path) -> Iterator[Path]:
    """What is to be inspected: the path itself, the weights of a run, or all files and folders below."""
    here = Found(path)
    if not here.is_folder or is_one(here):
        yield path
        return
    problem: FileNotFoundError | None = None
    try:
        yield native.weights_folder(path)
        return
    except FileNotFoundError as error:
        problem = error
    n_files = n_found = 0
    for folder in (path, *folders_of(path)):
        inside = Found(folder)
        if folder != path and is_one_or_damaged(folder):
            n_found += 1
            yield folder
            continue
        files = sorted(name for name in inside.names if name.endswith(ENDINGS))
        n_files += len(files)
        if n_files > MOST_FILES:
            raise ValueError(f"{path}: holds more than {MOST_FILES:,} files of weights; give a folder further down.")
        for name in files:
            if is_of_one(Found(folder / name)):
                n_found += 1
                yield folder / name
    if not n_found:
        raise problem


def is_of_one(found: Found) -> bool:
    """Whether a file among others is to be listed: an autoencoder, or one that cannot be opened."""
    try:
        with blamed_on(found.path):
            family = next((family for family in FAMILIES if family.recognises(found)), None)
            if family in (None, native, mats):  # which take every file of their endings
                return family is not None and bool(family.read(found, Given()))
        return True
    except (ValueError, OSError):
        return is_damaged(found)


def is_damaged(found: Found) -> bool:
    try:
        tensors_of(found)
    except (ValueError, OSError):
        return True
    return False


def is_wanted(config: Mapping[str, Any], given: Given) -> bool:
    """Whether a config may be of the place that is named. Where no place is known, its layer decides."""
    if "hook_point" not in config:
        return True  # a crosscoder, or one with a problem
    hook_point, named = config["hook_point"], given.hook_point
    layer = layer_of(hook_point)
    layer = config.get("hook_point_layer") if layer is None else layer
    if hook_point == UNKNOWN:
        return layer in (given.layer, None if named is None else layer_of(named))
    hook_points = (hook_point, hook_point.replace("{layer}", str(layer)))
    wanted = named and transformer_lens_name(named, config.get("model_name"))
    return (wanted is None or wanted in hook_points) and given.layer in (None, layer)


def inspect_one(found: Found, full: bool, given: Given = Given(), alone: bool = True) -> dict[str, dict[str, Any]]:  # noqa: B008
    """What a file or folder holds, by name. ValueError or OSError if its headers cannot be read.

    A place that `given` names is what the files leave out only if this is the one autoencoder there is.
    """
    if not found.is_folder and not found.path.is_file():
        raise ValueError(f"{found.path}: neither a file nor a folder, but a device or a pipe; give a file.")
    with blamed_on(found.path):
        family = next((family for family in FAMILIES if family.recognises(found)), None)
        if family is None:
            raise ValueError(unknown(found))
        name = format_of(family, found)
    module = family.__name__.rpartition(".")[2]
    common = {"family": name if family is refused else module, "path": str(found.path)}
    tensors = tensors_of(found)
    of_size = {}
    try:
        with blamed_on(found.path):
            loaded = read_by(family, found, given, alone)
    except (ValueError, OSError) as error:
        if not any(tensors.values()):
            raise
        told = {**common, "format": name, "tensors": tensors, "problem": str(error)}
        return {found.path.name: with_figures(told, found, {}, full, of_size)}
    return {
        name: with_figures({**common, "tensors": tensors, **described(one, found)}, found, one.values, full, of_size)
        for name, one in loaded.items()
    }


def read_by(family: Any, found: Found, given: Given, alone: bool) -> dict[str, Loaded]:
    used = given.without_place()
    read = family.read(found, used)
    if given.names_a_place and alone and len(read) == 1:
        read, used = family.read(found, given), given
    return {name: completed(one, used, found.path) for name, one in read.items()}


def format_of(family: Any, found: Found) -> str:
    """What files are, where no config of theirs could be read."""
    if family in (refused, single_files):
        return str(family.kind_of(found))
    return family.__name__.rpartition(".")[2]


def described(loaded: Loaded, found: Found) -> dict[str, Any]:
    told: dict[str, Any] = {"problem": type_not_read(found)}
    if loaded.is_crosscoder:
        return described_crosscoder(loaded, found)
    values = dict(loaded.values)
    try:
        with warnings.catch_warnings(action="ignore"):  # its remarks are listed
            cfg = config_of(loaded, found.path)
        values = {name: getattr(cfg, name) for name in SAYS_WHAT_IT_IS if says(cfg, name)}
    except ValueError as error:
        told["problem"] = str(error)
    told["format"] = values.get("file_format") or "sae_training"
    told["config"] = {name: plain(value) for name, value in values.items() if value is not None}
    told["convention"] = loaded.convention
    told["missing"] = [name for name in PLACES if values.get(name) == UNKNOWN]
    told["warnings"] = [*loaded.remarks, *traps(found, loaded)]
    return told


def described_crosscoder(loaded: Loaded, found: Found) -> dict[str, Any]:
    """The same of a crosscoder; `latents` has the places that each set of latents reads and writes, by number."""
    values = {name: value for name, value in loaded.values.items() if name != "latents" and value is not None}
    return {
        "problem": type_not_read(found),
        "format": values["file_format"],
        "config": {"sets_of_latents": len(loaded.values["latents"])} | {n: plain(value) for n, value in values.items()},
        "latents": [{"reads": plain(reads), "writes": plain(writes)} for reads, writes in loaded.values["latents"]],
        "convention": loaded.convention,
        "missing": [name for name in PLACES if values.get(name) == UNKNOWN],
        "warnings": [*loaded.remarks, *traps(found, loaded)],
        "load": "Crosscoder.load_from_pretrained of sae_training.sparse_autoencoder",
    }


def says(cfg: LanguageModelSAERunnerConfig, name: str) -> bool:
    """Whether a field says something about an autoencoder of this architecture."""
    only_in = ONLY_IN.get(name)
    is_transcoder = cfg.target_hook_point is not None
    if name in ("skip_connection", "d_out"):
        return is_transcoder
    if name == "apply_b_dec_to_input":
        return not is_transcoder
    return (only_in is None or cfg.architecture in only_in) and getattr(cfg, name) != ()


def type_not_read(found: Found) -> str | None:
    """Why the tensors cannot be computed with, though their headers can be read; None if they can."""
    for file, parts in files_with_tensors(found):
        for name, (_, dtype) in parts.items():
            if not is_read(dtype):
                return f"{found.path}: {name} of {file} is {dtype}, expected float32 or another that torch has here."
    return None


def is_read(dtype: str) -> bool:
    return isinstance(getattr(torch, dtype, None), torch.dtype)


def plain(value: Any) -> Any:
    """A value in JSON's types."""
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value).removeprefix("torch.")


def tensors_of(found: Found) -> dict[str, dict[str, dict[str, Any]]]:
    """Shapes and dtypes of all tensors, by file and name."""
    return {
        file: {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in parts.items()}
        for file, parts in files_with_tensors(found)
    }


def files_with_tensors(found: Found) -> Iterator[tuple[str, dict[str, tuple[tuple[int, ...], str]]]]:
    folder = weights_of(found)
    names = sorted(folder.names) if folder.is_folder else [folder.path.name]
    of_openmoss = llama_scope.weights_file(found) if llama_scope.recognises(found) else None
    if of_openmoss not in (None, llama_scope.IN_SHARDS, *names):
        names.append(of_openmoss)  # checkpoints/final.safetensors
    for name in names:
        if name.endswith((".safetensors", ".npz")):
            head = folder.header(name)
            yield name, {key: (head.shapes[key], head.dtypes[key]) for key in head.shapes}
        elif name in (*PICKLES_OF_FOLDERS, of_openmoss) or folder.is_pickle:
            state = tensors_by_name(folder.pickle(name))
            yield name, {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in state.items()}


def weights_of(found: Found) -> Found:
    """The folder in which the weights lie: of a run one below it."""
    return Found(native.weights_folder(found.path)) if found.is_folder and not is_one(found) else found


def with_figures(
    told: dict[str, Any], found: Found, values: Mapping[str, Any], full: bool, of_size: dict[int | None, Any]
) -> dict[str, Any]:
    """`of_size` keeps the figures by the number of latents, for the others in the same files."""
    if full:
        folder = weights_of(found)
        size = n_latents(values, {name: part for parts in told["tensors"].values() for name, part in parts.items()})
        if size not in of_size:
            of_size[size] = {
                file: {
                    name: figures(folder.slices(file, name), tuple(part["shape"]), n_latents(values, parts), name)
                    for name, part in parts.items()
                    if is_read(part["dtype"])
                }
                for file, parts in told["tensors"].items()
            }
        told["figures"] = of_size[size]
        told["warnings"] = [*told.get("warnings", []), *warnings_of(told["figures"])]
    return told


def n_latents(values: Mapping[str, Any], parts: Mapping[str, Any]) -> int | None:
    """How many latents there are, by the config or by the length of the encoder's bias."""
    if values.get("d_sae"):
        return values["d_sae"]
    if values.get("d_in"):
        return values.get("n_latents") or values["d_in"] * values.get("expansion_factor", 1)
    bias = next((part["shape"] for name, part in parts.items() if name.endswith(("b_enc", "encoder.bias"))), [])
    return bias[-1] if bias else None


def warnings_of(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    for file, parts in figures.items():
        for name, told in parts.items():
            if n_bad := told["nan"] + told["infinite"]:
                yield f"{file}: {name} has {n_bad:,} of {told['values']:,} values that are NaN or infinite"
            if told.get("decoder_norms", {}).get("dead"):
                yield f"{file}: {told['decoder_norms']['dead']:,} decoder rows of {name} are zero or next to it"
