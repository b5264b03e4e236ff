"""Crosscoders and cross-layer transcoders of Gemma Scope 2: a folder with params_layer_<i>.safetensors for each place.

A file has the latents that read its place: w_enc (d, m), w_dec (m, places, d), threshold (m,), and perhaps
affine_skip_connection (d, d), which is not transposed. i counts places, not layers; the folder's name has the layers of
a crosscoder, crosscoder/layer_7_13_17_22_width_65k_l0_medium. All places are written, those of earlier layers with
zeros.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_training.formats.found import Found
from sae_training.formats.gemma_scope import CONFIG, model_of_second
from sae_training.formats.loaded import Given, Loaded, precisions
from sae_training.formats.several_places import (
    CROSS_LAYER,
    CROSSCODER,
    Tensors,
    check_shapes,
    check_sizes,
    each_to_all,
    files_by_number,
    loaded_crosscoder,
    numbered,
)

FILE = re.compile(r"params_layer_(\d+)\.safetensors")
LAYERS = re.compile(r"layer_(\d+(?:_\d+)+)_width_.*")
SKIP = "affine_skip_connection"


def recognises(found: Found) -> bool:
    return any(FILE.fullmatch(name) for name in (found.names if found.is_folder else {found.path.name}))


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The crosscoder of the folder. ValueError for one file of it, and for files that do not fit each other."""
    if not found.is_folder:
        raise ValueError(
            f"{found.path}: one place of a crosscoder or cross-layer transcoder, whose latents write to all places; "
            "give the folder to Crosscoder.load_from_pretrained."
        )
    folder = found.folder
    files = files_by_number(found.names, FILE, folder)
    first = found.header(files[0])
    shape = first.shapes.get("w_dec", ())
    if len(shape) != 3 or shape[1] != len(files):
        raise ValueError(f"{folder}: w_dec has shape {shape} in {files[0]}, expected (m, {len(files)}, d); check it.")
    m, n, d = shape
    check_sizes(folder, n, m, d)
    has_skip = SKIP in first.shapes
    expected = {"w_enc": (d, m), "b_enc": (m,), "threshold": (m,), "w_dec": shape, "b_dec": (d,)}
    for file in files:
        check_shapes(folder / file, found.header(file).shapes, expected | ({SKIP: (d, d)} if has_skip else {}))
    config = found.json(CONFIG) if CONFIG in found.names else {}
    architecture, reads, writes = places(folder, n)
    values = {
        "architecture": architecture,
        "reads": reads,
        "writes": writes,
        "latents": each_to_all(n),
        "d_in": d,
        "d_out": d,
        "d_sae": m,
        "activation": "jumprelu",
        "skip_connection": has_skip,
        "model_name": model_of_second(config, folder.absolute().parts),
        "file_format": f"gemma_scope 2 {'clt' if architecture == CROSS_LAYER else 'crosscoder'}",
        "file_dtype": precisions(first.dtypes["w_dec"])["file_dtype"],
    }
    remarks = () if reads[0] != "0" else ("the files do not name their places, and neither does the path",)
    return {folder.absolute().name: loaded_crosscoder(given, values, partial(weights, found, files), remarks)}


def places(folder: Path, n: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """What it is, and the places that it reads and writes, by the names of the folders."""
    parts = folder.absolute().parts
    if "clt" in parts:
        reads, writes = "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"
        return CROSS_LAYER, tuple(map(reads.format, range(n))), tuple(map(writes.format, range(n)))
    named = next((matched for part in reversed(parts) if (matched := LAYERS.fullmatch(part))), None)
    layers = named[1].split("_") if named else []
    reads = tuple(f"blocks.{int(layer)}.hook_resid_post" for layer in layers) if len(layers) == n else numbered(n)
    return CROSSCODER, reads, reads


def weights(found: Found, files: list[str]) -> Tensors:
    made: Tensors = {}
    rows: dict[str, list[Any]] = {}
    for number, file in enumerate(files):
        state = found.tensors(file)
        made[f"W_enc.{number}.0"] = state.pop("w_enc")
        made |= {f"W_dec.{number}.{j}": W for j, W in enumerate(state.pop("w_dec").unbind(1))}
        for name, tensor in state.items():
            rows.setdefault(name, []).append(tensor)
    made |= {"W_skip" if name == SKIP else name: torch.stack(tensors) for name, tensors in rows.items()}
    made["threshold"].clamp_min_(0)  # the program has relu(pre) * (pre > threshold)
    return made
