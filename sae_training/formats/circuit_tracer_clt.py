"""Cross-layer transcoders of circuit-tracer: W_enc_<i>.safetensors and W_dec_<i>.safetensors for each layer.

W_enc_i is (m, d), a latent a row, and W_dec_i (m, layers - i, d): its slot j is for layer i + j. ReLU, or JumpReLU if
there is threshold_i. Nothing is subtracted, and there is no skip connection in files. config.yaml names the hooks.
"""

from __future__ import annotations

import re
from functools import partial

import torch

from sae_training.formats.circuit_tracer import CONFIG, hook
from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, precisions
from sae_training.formats.several_places import (
    CROSS_LAYER,
    Tensors,
    check_shapes,
    check_sizes,
    each_to_later,
    files_by_number,
    loaded_crosscoder,
)

ENCODER, DECODER = re.compile(r"W_enc_(\d+)\.safetensors"), re.compile(r"W_dec_(\d+)\.safetensors")


def recognises(found: Found) -> bool:
    names = found.names if found.is_folder else {found.path.name}
    return any(ENCODER.fullmatch(name) or DECODER.fullmatch(name) for name in names)


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The transcoder of the folder. ValueError for one file of it, and for files that do not fit each other."""
    folder = found.folder
    if not found.is_folder:
        raise ValueError(
            f"{found.path}: one layer of a cross-layer transcoder, whose latents write to all later layers; give the "
            "folder to Crosscoder.load_from_pretrained."
        )
    encoders, decoders = (files_by_number(found.names, pattern, folder) for pattern in (ENCODER, DECODER))
    n = len(encoders)
    if len(decoders) != n:
        raise ValueError(f"{folder}: {n} files W_enc_<i> and {len(decoders)} files W_dec_<i>; use the whole folder.")
    first = found.header(encoders[0])
    shape = first.shapes.get("W_enc_0", ())
    if len(shape) != 2:
        raise ValueError(f"{folder / encoders[0]}: W_enc_0 has shape {shape}, expected two axes; use another copy.")
    m, d = shape
    check_sizes(folder, n, m, d)
    has_threshold = "threshold_0" in first.shapes
    for i in range(n):
        expected = {f"W_enc_{i}": (m, d), f"b_enc_{i}": (m,), f"b_dec_{i}": (d,)}
        expected |= {f"threshold_{i}": (m,)} if has_threshold else {}
        check_shapes(folder / encoders[i], found.header(encoders[i]).shapes, expected)
        check_shapes(folder / decoders[i], found.header(decoders[i]).shapes, {f"W_dec_{i}": (m, n - i, d)})
    config = found.yaml(CONFIG) if CONFIG in found.names else {}
    model_name = config.get("model_name")
    reads, writes = (
        tuple(hook(config, key, layer) or str(layer) for layer in range(n))
        for key in ("feature_input_hook", "feature_output_hook")
    )
    values = {
        "architecture": CROSS_LAYER,
        "reads": reads,
        "writes": writes,
        "latents": each_to_later(n),
        "d_in": d,
        "d_out": d,
        "d_sae": m,
        "activation": "jumprelu" if has_threshold else "relu",
        "model_name": model_name if isinstance(model_name, str) else None,
        "file_format": "circuit_tracer clt",
        "file_dtype": precisions(first.dtypes["W_enc_0"])["file_dtype"],
    }
    return {folder.absolute().name: loaded_crosscoder(given, values, partial(weights, found, encoders, decoders))}


def weights(found: Found, encoders: list[str], decoders: list[str]) -> Tensors:
    made: Tensors = {}
    rows: dict[str, list[torch.Tensor]] = {}
    for i, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
        state = found.tensors(encoder)
        made[f"W_enc.{i}.0"] = state.pop(f"W_enc_{i}").T
        made |= {f"W_dec.{i}.{j}": W for j, W in enumerate(found.tensors(decoder)[f"W_dec_{i}"].unbind(1))}
        for name, tensor in state.items():
            rows.setdefault(name.removesuffix(f"_{i}"), []).append(tensor)
    return made | {name: torch.stack(tensors) for name, tensors in rows.items()}
