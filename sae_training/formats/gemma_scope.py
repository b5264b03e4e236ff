"""Files of Gemma Scope 1 (params.npz) and 2 (params.safetensors): JumpReLU, nothing subtracted from the input.

The files name neither model nor place: the path does, google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71,
or, of the second, config.json beside the weights.

| files                | reads                                      | writes                                        |
|----------------------|--------------------------------------------|-----------------------------------------------|
| 1, res, mlp, att     | hook_resid_post, hook_mlp_out, attn.hook_z | the same                                      |
| 1, embedding         | hook_embed, divided by sqrt(d_in)          | the same, times sqrt(d_in)                    |
| 1, transcoders       | ln2.hook_normalized (without its weights)  | hook_mlp_out (after Gemma's norm)             |
| 2, transcoder        | mlp.hook_in (after the norm's weights)     | hook_mlp_out, with x @ affine_skip_connection |

The first were trained on embeddings as the table of the model has them, and Gemma multiplies them by sqrt(d_in), as the
hook has them: the factor is folded, b_dec included (SAELens leaves b_dec as it is).
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats import folding, releases
from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, place_and_text, precisions, sizes
from sae_training.machine.precision import at_least_float32

NPZ, WEIGHTS, CONFIG = "params.npz", "params.safetensors", "config.json"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
SKIP = "affine_skip_connection"  # (d_in, d_out), not transposed

PARTS = {
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "attn.hook_z",
    "transcoder": "mlp.hook_in",
}
"""Folders of Gemma Scope 2, perhaps with _all after them, and hooks."""

MODULES = {
    "output": "resid_post",
    "post_feedforward_layernorm.output": "mlp_out",
    "self_attn.o_proj.input": "attn_out",
    "pre_feedforward_layernorm.output": "transcoder",
}
"""Ends of hf_hook_point_in, and those folders."""


def recognises(found: Found) -> bool:
    file = file_of(found)
    if file is None or not (found.folder / file).is_file():
        return False
    names = found.header(file).shapes.keys()
    lower = {name.lower() for name in names}
    return {"w_enc", "threshold"} <= lower and (file.endswith(".npz") or "w_enc" in names)


def file_of(found: Found) -> str | None:
    if found.is_folder:
        return next((name for name in (NPZ, WEIGHTS) if name in found.names), None)
    return found.path.name if found.path.suffix in (".npz", ".safetensors") else None


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The autoencoder or transcoder of the folder or file. ValueError for what is missing, and parts of crosscoders."""
    file = file_of(found) or WEIGHTS
    path, header = found.folder / file, found.header(file)
    theirs = {ours(name): name for name in header.shapes}
    missing = [name for name in NAMES if name not in theirs]
    unknown = theirs.keys() - {*NAMES, SKIP}
    if missing or unknown:
        raise ValueError(
            f"{path}: {', '.join([*missing, *sorted(unknown)])}: found {', '.join(header.shapes)}, expected "
            f"{', '.join(NAMES)} and perhaps {SKIP}; use another copy."
        )
    shapes = {name: header.shapes[theirs[name]] for name in theirs}
    refuse_several_places(path, shapes)
    d_in, d_sae = shapes["W_enc"]
    is_second = file.endswith(".safetensors")
    dtype = header.dtypes[theirs["W_dec"]]
    values = sizes(d_in, d_sae) | {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "model_processing": "none",
        "file_format": f"gemma_scope {2 if is_second else 1}",
        **precisions(dtype),
    }
    config = found.json(CONFIG) if is_second and CONFIG in found.names else {}
    values |= place_of_second(path, config, given) if is_second else place_of_first(path, given)
    if SKIP in shapes and "target_hook_point" not in values:
        values |= {"hook_point": given.hook_point or "unknown", "target_hook_point": "unknown"}
    if "target_hook_point" in values:
        values |= {"d_out": shapes["W_dec"][1], "skip_connection": SKIP in shapes, "apply_b_dec_to_input": True}
    is_embedding = values["hook_point"] == "hook_embed"
    name = path.parent.absolute().name if file in (NPZ, WEIGHTS) else path.stem
    return {name: Loaded(values, partial(weights, found, file, is_embedding), remarks(path, values))}


def ours(name: str) -> str:
    return re.sub("^w_", "W_", name)


def refuse_several_places(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    if len(shapes["W_dec"]) == 3:
        raise ValueError(
            f"{path}: w_dec has shape {shapes['W_dec']}: one place of a crosscoder or cross-layer transcoder; name its "
            "files params_layer_<i>.safetensors, as they were, and give the folder to Crosscoder.load_from_pretrained."
        )
    if not len(shapes["W_dec"]) == len(shapes["W_enc"]) == 2:
        raise ValueError(f"{path}: W_enc {shapes['W_enc']}, W_dec {shapes['W_dec']}, expected two axes each.")


def remarks(path: Path, values: dict[str, Any]) -> tuple[str, ...]:
    if values["hook_point"] == "unknown":
        return (f"whether this is an autoencoder or a transcoder, and of which place, only the path says: {path.name}",)
    return ()


# --------------------------------------------------------------------------------------------------------------- places


def place_of_first(path: Path, given: Given) -> dict[str, Any]:
    """Place by the repository's name in the path, and the folders below it (`releases.json`)."""
    parts = path.absolute().parts
    facts = releases.facts_of(path, "gemma_scope 1")
    target = given.target_hook_point or facts.get("target_hook_point")  # nothing else tells a transcoder
    hook_point = "hook_embed" if "embedding" in parts else facts.get("hook_point")
    layer = 0 if "embedding" in parts else layer_in(parts)
    place = place_and_text(given, facts.get("model_name"), hook_point, layer)
    return place | ({"target_hook_point": target} if target else {})


def place_of_second(path: Path, config: dict[str, Any], given: Given) -> dict[str, Any]:
    """Place by config.json, or else by the folders' names."""
    parts = path.absolute().parts
    part = next((name for name in map(without_all, reversed(parts)) if name in PARTS), None)
    layer = layer_in(parts)
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(config.get("hf_hook_point_in", ""))):
        layer, part = int(found[1]), MODULES.get(found[2])
    model = model_of_second(config, parts)
    if part is None or layer is None:
        return place_and_text(given, model, None, layer)
    target = {"target_hook_point": f"blocks.{layer}.hook_mlp_out"} if part == "transcoder" else {}
    return place_and_text(given, model, f"blocks.{layer}.{PARTS[part]}", layer) | target


def without_all(name: str) -> str:
    return name.removesuffix("_all")


def layer_in(parts: tuple[str, ...]) -> int | None:
    return next((int(found[1]) for part in reversed(parts) if (found := re.match(r"layer_(\d+)(?:_|$)", part))), None)


def model_of_second(config: dict[str, Any], parts: tuple[str, ...]) -> str | None:
    """google's name of the model: gemma-v3-1b-pt is google/gemma-3-1b-pt, but the smallest has no -pt."""
    stated = config.get("model_name")
    if not isinstance(stated, str):
        named = (re.fullmatch(r"(?:.*--)?gemma-scope-2-(\w+-(?:pt|it))", part) for part in reversed(parts))
        stated = next((f"gemma-3-{found[1]}" for found in named if found), None)
    if stated is None:
        return None
    name = stated.replace("-v3", "-3")
    return f"google/{name.removesuffix('-pt') if '270m' in name else name}"


# -------------------------------------------------------------------------------------------------------------- weights


def weights(found: Found, file: str, is_embedding: bool) -> dict[str, Tensor]:
    theirs = found.tensors(file)
    made = {ours(name): tensor.to(at_least_float32(tensor.dtype)) for name, tensor in theirs.items()}
    made["log_threshold"] = folding.log_thresholds(made.pop("threshold"))
    made["W_enc"] = folding.latent_by_latent(made["W_enc"])
    if SKIP in made:
        made["W_skip"] = made.pop(SKIP)
    if is_embedding:
        folding.fold_norm_factor(made, len(made["b_dec"]) ** -0.5)
    return made
