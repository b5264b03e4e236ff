"""Releases of one .pt file for each place, whose tensors' names tell the program: Goodfire, Qwen Scope, attention SAEs.

| release                         | tensors                                           | activations                 |
|---------------------------------|---------------------------------------------------|-----------------------------|
| Goodfire (ReLU)                 | encoder_linear.*, decoder_linear.*                | ReLU, nothing subtracted    |
| Qwen Scope, layer<i>.sae.pt     | W_enc (n, d), W_dec (d, n): both the other way    | the k largest, as above     |
| attention SAEs (Kissane et al.) | W_enc, W_dec, with <same name>_cfg.json beside it | ReLU of the centred input   |

qresearch's files have the tensors of dictionary_learning's AutoEncoderNew, which reads them. Qwen's k is in the name of
the repository alone, SAE-Res-Qwen3-8B-Base-W64K-L0_50, and a caller gives it if the path has lost that name.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of
from sae_training.formats.loaded import Given, Loaded, fitting_batch, needed, place_and_text, precisions, sizes
from sae_training.formats.pickles import copied
from sae_training.formats.releases import facts_of

GOODFIRE = {
    "encoder_linear.weight": "W_enc",
    "encoder_linear.bias": "b_enc",
    "decoder_linear.weight": "W_dec",
    "decoder_linear.bias": "b_dec",
}
MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

QWEN_FILE = re.compile(r"layer(\d+)\.sae\.pt")


def recognises(found: Found) -> bool:
    return kind_of(found) is not None


def kind_of(found: Found) -> str | None:
    """Which of the releases a file is of; None: of none of them."""
    if not found.is_pickle or not isinstance(state := found.pickle(), dict):
        return None
    if state.keys() == GOODFIRE.keys():
        return "goodfire"
    if state.keys() != MATRICES.keys():
        return None
    if QWEN_FILE.fullmatch(found.path.name):
        return "qwen_scope"
    return "attention_saes" if sidecar(found) in found.names else None


def sidecar(found: Found) -> str:
    return f"{found.path.stem}_cfg.json"


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The autoencoder of the file. ValueError for shapes that do not fit, and for a k that nobody says."""
    state, path, kind = found.pickle(), found.path, kind_of(found)
    is_linear = kind != "attention_saes"  # as torch.nn.Linear has it: outputs first
    W_enc = state["encoder_linear.weight" if kind == "goodfire" else "W_enc"]
    d_in, d_sae = reversed(W_enc.shape) if is_linear else W_enc.shape
    biases = state["encoder_linear.bias" if kind == "goodfire" else "b_enc"]
    if len(biases) != d_sae:
        raise ValueError(f"{path}: b_enc has {len(biases)} values, expected {d_sae}, as W_enc is {tuple(W_enc.shape)}.")
    dtype = str(W_enc.dtype).removeprefix("torch.")
    values = sizes(d_in, d_sae) | {
        "architecture": "topk" if kind == "qwen_scope" else "standard",
        "apply_b_dec_to_input": not is_linear,
        "model_processing": "none" if is_linear else "default",  # HookedTransformer.from_pretrained(model_name)
        "file_format": kind,
        **precisions(dtype),
    }
    match kind:
        case "goodfire":
            values |= place_and_text(given)  # and what is known of the release
        case "qwen_scope":
            values |= place_of_qwen(path, given)
        case _:
            values |= place_of_attention(found, given)
    names = GOODFIRE if kind == "goodfire" else MATRICES
    return {path.name.split(".")[0]: Loaded(values, partial(weights, state, names, is_linear))}


def place_of_qwen(path: Path, given: Given) -> dict[str, Any]:
    file = QWEN_FILE.fullmatch(path.name)
    layer = int(file[1]) if file else None
    in_name = facts_of(path, "qwen_scope").get("k")
    k = needed(given.k, in_name, "k (L0_<k> in the repository's name)", "k", path)
    return {"k": k} | place_and_text(given, None, f"blocks.{layer}.hook_resid_post", layer)


def place_of_attention(found: Found, given: Given) -> dict[str, Any]:
    """What the config beside the file says: the hook, which has all heads side by side, the model, the contexts."""
    config = found.json(sidecar(found))
    hook_point, model, length = (config.get(key) for key in ("act_name", "model_name", "seq_len"))
    hook_point = hook_point if isinstance(hook_point, str) else None
    layer = layer_of(hook_point) if hook_point else None
    values = place_and_text(given, model if isinstance(model, str) else None, hook_point, layer)
    return values | (fitting_batch(length) if isinstance(length, int) and length >= 2 else {})


def weights(state: dict[str, Tensor], names: dict[str, str], is_linear: bool) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for theirs, name in names.items():
        is_other_way = is_linear if name == "W_dec" else not is_linear and name == "W_enc"
        tensor = copied(state[theirs], is_other_way)
        ours[name] = tensor.T if name == "W_enc" else tensor
    return ours
