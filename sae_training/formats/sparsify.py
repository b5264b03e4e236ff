"""Files of EleutherAI's sae and sparsify: a folder for each place, with cfg.json and sae.safetensors.

The folder's name is the place: `layers.10` is the output of block 10 and `layer_10`, in local runs of mid 2024, its
input. A run's own config.json, above these folders, names the model and the text. `normalize_decoder` does not say that
rows have unit norm, because averages of weights are saved; nothing here relies on it.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of, output_of_module, transformer_lens_name
from sae_training.formats.json_files import read_above
from sae_training.formats.loaded import Given, Loaded, fitting_batch, needed, place_and_text, precisions, sizes
from sae_training.machine.precision import at_least_float32

CONFIG, WEIGHTS, RUN_CONFIG = "cfg.json", "sae.safetensors", "config.json"

NAMES = {"encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Theirs, and ours, where they lie alike."""

PARENTS_OF_A_PLACE = 3  # <run>/best/<place>/seed1


def recognises(found: Found) -> bool:
    return found.has(CONFIG, WEIGHTS) and "encoder.weight" in found.header(WEIGHTS).shapes


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The autoencoder or transcoder of the folder. ValueError for what is missing, or does not fit together."""
    where = found.folder / CONFIG
    cfg, header = found.json(CONFIG), found.header(WEIGHTS)
    missing = [name for name in ("encoder.weight", *NAMES) if name not in header.shapes]
    if missing:
        raise ValueError(
            f"{found.folder / WEIGHTS}: {', '.join(missing)} missing; use a copy with encoder and decoder."
        )
    unknown = header.shapes.keys() - {"encoder.weight", "W_skip", *NAMES}
    if unknown:
        raise ValueError(
            f"{found.folder / WEIGHTS}: {', '.join(sorted(unknown))}: not a tensor of sparsify's that is read; use "
            "a copy without."
        )
    d_sae, d_in = header.shapes["encoder.weight"]
    stated = cfg.get("num_latents") or d_in * cfg.get("expansion_factor", 0)
    if stated not in (0, d_sae) or cfg.get("d_in", d_in) != d_in:
        raise ValueError(f"{where}: says {cfg.get('d_in')} -> {stated}, but encoder.weight is {d_in} -> {d_sae}.")
    place, unreadable = places(found.folder, cfg, given)
    values = (
        sizes(d_in, d_sae)
        | place
        | {
            "architecture": architecture(cfg, where),
            "k": needed(given.k, cfg.get("k"), "k", "k", where),
            "model_processing": "none",
            "file_format": "sparsify",
            **precisions(header.dtypes["W_dec"]),
        }
    )
    if values.get("target_hook_point"):
        values |= {"d_out": header.shapes["W_dec"][1], "skip_connection": "W_skip" in header.shapes}
    elif "W_skip" in header.shapes:
        raise ValueError(f"{where}: W_skip is there, but transcode is not true; correct one of them.")
    return {found.folder.absolute().name: Loaded(values, partial(weights, found), remarks(cfg) + unreadable)}


def architecture(cfg: dict[str, Any], where: Path) -> str:
    if cfg.get("signed"):
        return "abstopk"
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise ValueError(f"{where}: activation: found {activation!r}, expected topk or groupmax.")
    return activation


def remarks(cfg: dict[str, Any]) -> tuple[str, ...]:
    if cfg.get("transcode") and "activation" not in cfg:
        return ("transcoders of before February 2025 subtracted b_dec from their input; the files do not say which",)
    return ()


def weights(found: Found) -> dict[str, Tensor]:
    theirs = {name: tensor.to(at_least_float32(tensor.dtype)) for name, tensor in found.tensors(WEIGHTS).items()}
    ours = {name: theirs[theirs_name] for theirs_name, name in NAMES.items()}
    ours["W_enc"] = theirs["encoder.weight"].T
    if "W_skip" in theirs:
        ours["W_skip"] = theirs["W_skip"].T.contiguous()
    return ours


# -------------------------------------------------------------------------------------------------------------- places


def places(folder: Path, cfg: dict[str, Any], given: Given) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Where activations come from, by the names of the folder and of those above it; then of what it is a link to.

    And remarks on the configs above.
    """
    written, meant = folder.absolute(), folder.resolve()
    above = tuple(part for path in (written, meant) for part in (path, *path.parents[:PARENTS_OF_A_PLACE]))
    run, unreadable = run_config(above)
    name = next((part.name for part in above if hook_of(part.name) is not None), "")
    model = given.model_name or (run["model"] if isinstance(run.get("model"), str) else None)
    dataset = run["dataset"] if isinstance(run.get("dataset"), str) else None
    hook_point = hook_of(name, model)
    values: dict[str, Any] = {}
    if cfg.get("transcode"):
        block = layer_of(name)
        is_mlp = name.endswith(".mlp") and block is not None
        output = f"blocks.{block}.{output_of_module('hook_mlp_out', model)}" if is_mlp else hook_point
        values["target_hook_point"] = output or "unknown"
        hook_point = f"blocks.{block}.mlp.hook_in" if is_mlp else None
    layer = layer_of(hook_point) if hook_point else None
    values |= place_and_text(given, model, hook_point, layer, dataset)
    if isinstance(run.get("ctx_len"), int):
        values |= fitting_batch(run["ctx_len"])
    if isinstance(run.get("split"), str):
        values["dataset_split"] = run["split"]
    return values, unreadable


def hook_of(name: str, model_name: str | None = None) -> str | None:
    """The TransformerLens name of a folder's place, or None if the name is that of no place."""
    if old := re.fullmatch(r"layer_(\d+)", name):
        return f"blocks.{old[1]}.hook_resid_pre"
    hook_point = transformer_lens_name(name, model_name)
    return hook_point if hook_point != name or layer_of(name) is not None else None


def run_config(folders: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of the run that the folders lie in, and remarks on files that may be it; {} if there is none."""
    remarks: dict[str, None] = {}
    for folder in folders:
        if (folder / RUN_CONFIG).is_file():
            values, unreadable = read_above(folder / RUN_CONFIG)
            remarks |= dict.fromkeys(unreadable)
            if {"model", "dataset"} <= values.keys():
                return values, tuple(remarks)
    return {}, tuple(remarks)
