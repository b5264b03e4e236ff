"""Per-layer transcoders of circuit-tracer: a folder with layer_<i>.safetensors for each layer, and config.yaml.

Nothing is subtracted from the input. W_enc and W_dec are both (d_sae, d_in): a latent is a row. In files of June 2025
W_dec is (d_in, d_sae); the length of b_enc tells them apart, unless the two sizes are equal.

Activations are x * (x > threshold). Above a threshold below 0 they may be negative, which no jumprelu here is.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats import folding
from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, place_and_text, precisions, sizes
from sae_training.formats.releases import facts_of
from sae_training.machine.precision import at_least_float32

CONFIG = "config.yaml"
LAYER = re.compile(r"layer_(\d+)\.safetensors")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
THRESHOLD, SKIP = "activation_function.threshold", "W_skip"


def recognises(found: Found) -> bool:
    files = files_of(found)
    return bool(files) and {*NAMES} <= found.header(files[0]).shapes.keys()


def files_of(found: Found) -> list[str]:
    names = found.names if found.is_folder else {found.path.name}
    return sorted(filter(LAYER.fullmatch, names), key=lambda name: int(re.sub(r"\D", "", name)))


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The transcoders by `layer_<i>`. ValueError for tensors that do not fit."""
    config = found.yaml(CONFIG) if CONFIG in found.names else {}
    return {file.removesuffix(".safetensors"): read_layer(found, file, config, given) for file in files_of(found)}


def read_layer(found: Found, file: str, config: dict[str, Any], given: Given) -> Loaded:
    header, path = found.header(file), found.folder / file
    shapes = header.shapes
    unknown = shapes.keys() - {*NAMES, THRESHOLD, SKIP}
    if unknown:
        raise ValueError(f"{path}: {', '.join(sorted(unknown))}: not a tensor of a transcoder that is read.")
    missing = [name for name in NAMES if name not in shapes]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing; use another copy.")
    d_sae, d_in = shapes["W_enc"]
    d_out = shapes["b_dec"][0]
    if shapes["b_enc"] != (d_sae,) or shapes["W_dec"] not in ((d_sae, d_out), (d_out, d_sae)):
        raise ValueError(f"{path}: W_enc {shapes['W_enc']}, b_enc {shapes['b_enc']}, W_dec {shapes['W_dec']} differ.")
    is_old = shapes["W_dec"] != (d_sae, d_out)
    found_layer = LAYER.fullmatch(file)
    layer = int(found_layer[1]) if found_layer else 0
    dtype = header.dtypes["W_dec"]
    known = facts_of(path, "circuit_tracer")
    model = config.get("model_name") or known.get("model_name")
    hook_point = hook(config, "feature_input_hook", layer) or known.get("hook_point")
    target = hook(config, "feature_output_hook", layer) or known.get("target_hook_point")
    values = (
        sizes(d_in, d_sae)
        | place_and_text(given, model, hook_point, layer)
        | {
            "architecture": "jumprelu" if THRESHOLD in shapes else "standard",
            "target_hook_point": target or "unknown",
            "d_out": d_out,
            "skip_connection": SKIP in shapes,
            "model_processing": "none",
            "file_format": "circuit_tracer",
            **precisions(dtype),
        }
    )
    remark = "W_dec is square: read with latents as rows, as since July 2025; files of before had them as columns"
    return Loaded(values, partial(weights, found, file, is_old), (remark,) if d_sae == d_out else ())


def hook(config: dict[str, Any], key: str, layer: int) -> str | None:
    name = config.get(key)
    return f"blocks.{layer}.{name}" if isinstance(name, str) else None


def weights(found: Found, file: str, is_old: bool) -> dict[str, Tensor]:
    made = {name: tensor.to(at_least_float32(tensor.dtype)) for name, tensor in found.tensors(file).items()}
    made["W_enc"] = made["W_enc"].T
    if is_old:
        made["W_dec"] = made["W_dec"].T.contiguous()
    if THRESHOLD in made:
        check_thresholds(made[THRESHOLD], found.folder / file)
        made["log_threshold"] = folding.log_thresholds(made.pop(THRESHOLD))
    if SKIP in made:
        made[SKIP] = made[SKIP].T.contiguous()
    return made


def check_thresholds(threshold: Tensor, path: Path) -> None:
    """ValueError for thresholds below 0, above which that program has activations below 0."""
    n_below = int((threshold < 0).sum())
    if n_below:
        raise ValueError(
            f"{path}: {THRESHOLD}: found {n_below} of {len(threshold)} below 0 (the least is {float(threshold.min()):g}"
            "), expected 0 or more: circuit-tracer keeps pre-activations between such a threshold and 0 as negative "
            "activations, which a jumprelu here never has; load the file with circuit-tracer."
        )
