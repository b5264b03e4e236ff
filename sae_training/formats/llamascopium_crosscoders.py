"""Crosscoders and cross-layer transcoders of llamascopium 2: config.json with sae_type, and sae_weights.safetensors.

| sae_type   | tensors                                                                                     |
|------------|---------------------------------------------------------------------------------------------|
| crosscoder | W_E (heads, d, n), b_E (heads, n), W_D (heads, n, d), b_D (heads, d); a head is a place     |
| clt        | W_E (layers, d, n), b_E (layers, n); W_D.<i> (i + 1, n, d) and b_D.<i> (d,) of target layer i |

A crosscoder adds up the heads' pre-activations; each head then decides by its own decoder norms which latents are
active there. The program takes rows in the units of training, scaled to sqrt(d) by the average norms that the file
holds (norm_activation "dataset-wise"); here these factors are part of the weights. With "inference" they are already.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_training.formats.found import Found
from sae_training.formats.llama_scope import remarks_of_folding
from sae_training.formats.loaded import Given, Loaded, needed, precisions
from sae_training.formats.several_places import (
    CROSS_LAYER,
    CROSSCODER,
    Tensors,
    all_to_each,
    check_shapes,
    check_sizes,
    decoder_norms,
    each_to_later,
    loaded_crosscoder,
    scale_places,
    thresholds,
)

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
KINDS = ("crosscoder", "clt")
NORM, THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"

LEAST_NORM = 1e-8

CHOICES: dict[str, tuple[str, bool, bool]] = {
    # act_fn: the activation here, whether it is by the batch, whether it is across sets
    "relu": ("relu", False, False),
    "jumprelu": ("jumprelu", False, False),
    "topk": ("topk", False, False),
    "layertopk": ("topk", False, True),
    "batchtopk": ("batchtopk", True, False),
    "batchlayertopk": ("batchtopk", True, True),
}


def recognises(found: Found) -> bool:
    return found.has(CONFIG, WEIGHTS) and found.json(CONFIG).get("sae_type") in KINDS


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The crosscoder of the folder. ValueError for normalisations that no file holds, and for what does not fit."""
    config, path = found.json(CONFIG), found.folder / WEIGHTS
    is_clt = config["sae_type"] == "clt"
    reads = places(config, "hook_points_in" if is_clt else "hook_points", path)
    writes = places(config, "hook_points_out", path) if is_clt else reads
    n, d = len(reads), config["d_model"]
    d_sae = int(d * config["expansion_factor"])
    check_sizes(path, n, d, d_sae)
    act_fn, norm = str(config.get("act_fn", "relu")).lower(), config.get("norm_activation", "dataset-wise")
    if act_fn not in CHOICES or (not is_clt and "layer" in act_fn):
        raise ValueError(f"{path}: act_fn is {act_fn} in {CONFIG}, expected one of {', '.join(CHOICES)}.")
    if norm not in ("dataset-wise", "inference", *(() if is_clt else ("token-wise",))):
        raise ValueError(
            f"{path}: norm_activation is {norm} in {CONFIG}, which divides by norms of a batch, or of outputs that are "
            "not there at inference; expected dataset-wise or inference."
        )
    header = found.header(WEIGHTS)
    shapes = dict(header.shapes)
    stated = {name.removeprefix(NORM): shapes.pop(name) for name in list(shapes) if name.startswith(NORM)}
    if norm == "dataset-wise" and (missing := [place for place in (*reads, *writes) if place not in stated]):
        raise ValueError(f"{path}: {NORM}{missing[0]} is missing, which scales the activations; use a complete copy.")
    check_shapes(path, shapes, shapes_of(is_clt, n, d, d_sae, act_fn))
    activation, by_batch, across_sets = CHOICES[act_fn]
    across_sets = across_sets or (by_batch and not is_clt)
    values: dict[str, Any] = {
        "architecture": CROSS_LAYER if is_clt else CROSSCODER,
        "reads": reads,
        "writes": writes,
        "latents": each_to_later(n) if is_clt else all_to_each(n, n),
        "d_in": d,
        "d_out": d,
        "d_sae": d_sae,
        "activation": activation,
        "by_batch": by_batch,
        "across_sets": across_sets,
        "shares_encoder": not is_clt,
        "normalize_activations": "constant_norm_rescale" if norm == "token-wise" else "none",
        "file_format": f"llamascopium {config['sae_type']}",
        "file_dtype": precisions(header.dtypes["W_E"])["file_dtype"],
    }
    if "topk" in act_fn:
        k = needed(given.k, config.get("top_k"), "top_k", "k", path)
        values["k"] = k * n if across_sets and not is_clt else k
    by_norm = config.get("sparsity_include_decoder_norm", True)
    is_scaled = norm == "dataset-wise" and given.norm_factor is None
    check_norm_factor(found, norm, given)
    told = remarks(by_batch)
    if is_scaled:
        told += remarks_of_folding(found.folder / CONFIG, "train_clt" if is_clt else "train_crosscoder")
    read_weights = partial(weights, found, values, is_clt, by_norm, is_scaled)
    is_given = given.norm_factor is not None
    return {
        found.folder.absolute().name: loaded_crosscoder(given, values, read_weights, told, takes_norm_factor=is_given)
    }


def check_norm_factor(found: Found, norm: str, given: Given) -> None:
    """ValueError for another norm_factor than 1, which says that the norms are in the weights already."""
    if given.norm_factor is None or (given.norm_factor == 1 and norm == "dataset-wise"):
        return
    raise ValueError(
        f"{found.folder / CONFIG}: norm_factor: found {given.norm_factor:g} with norm_activation {norm}, expected "
        + ("1, as each place has a factor of its own; give 1 or none." if norm == "dataset-wise" else "none.")
    )


def places(config: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = config.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {key} is {str(names)[:80]} in {CONFIG}, expected the names of hook points.")
    return tuple(names)


def shapes_of(is_clt: bool, n: int, d: int, d_sae: int, act_fn: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"W_E": (n, d, d_sae), "b_E": (n, d_sae)}
    for i in range(n if is_clt else 0):
        shapes |= {f"W_D.{i}": (i + 1, d_sae, d), f"b_D.{i}": (d,)}
    if not is_clt:
        shapes |= {"W_D": (n, d_sae, d), "b_D": (n, d)}
    if act_fn == "jumprelu":
        shapes[THRESHOLD] = (n, d_sae) if is_clt else (d_sae,)
    return shapes


def remarks(by_batch: bool) -> tuple[str, ...]:
    if by_batch:
        return ("which latents are active depends on the rows that are encoded together, as in the files' own program",)
    return ()


def weights(found: Found, values: dict[str, Any], is_clt: bool, by_norm: bool, is_scaled: bool) -> Tensors:
    state = found.tensors(WEIGHTS)
    n, n_sets = len(values["reads"]), len(values["latents"])
    made: Tensors = {}
    if is_clt:
        for i in range(n):
            made[f"W_enc.{i}.0"] = state["W_E"][i]
            made |= {f"W_dec.{s}.{i - s}": W for s, W in enumerate(state[f"W_D.{i}"])}
        made |= {"b_enc": state["b_E"], "b_dec": torch.stack([state[f"b_D.{i}"] for i in range(n)])}
    else:
        made |= {f"W_enc.0.{j}": W for j, W in enumerate(state["W_E"])}
        made |= {f"W_dec.{s}.0": W for s, W in enumerate(state["W_D"])}
        made |= {"b_enc": state["b_E"].sum(dim=0, keepdim=True), "b_dec": state["b_D"]}
    norms = decoder_norms(made, n_sets) if by_norm else torch.ones(n_sets, values["d_sae"], dtype=made["b_enc"].dtype)
    if values["activation"] == "jumprelu":
        made["threshold"] = thresholds(state[THRESHOLD].exp(), norms)
    elif values["activation"] != "relu":
        made["weight_of_choice"] = norms
    if is_scaled:
        average = {name: float(state[f"{NORM}{name}"]) for name in {*values["reads"], *values["writes"]}}
        if bad := [name for name, norm in average.items() if not LEAST_NORM < norm < 1 / LEAST_NORM]:
            raise ValueError(
                f"{NORM}{bad[0]}: found {average[bad[0]]}, expected the average norm of activations to scale by; "
                "the program writes any number where it knows none; use a complete copy."
            )
        s_in, s_out = (
            [math.sqrt(values["d_in"]) / average[name] for name in values[key]] for key in ("reads", "writes")
        )
        scale_places(made, values, s_in, s_out)
    return made
