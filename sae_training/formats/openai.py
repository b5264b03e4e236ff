"""Files of OpenAI's sparse_autoencoder: <location>_v5_32k/autoencoders/<layer>.pt, of GPT-2 small.

A state dict with strings in it: the activation is "ReLU" (v1, v4) or "TopK" (v5), which alone normalises rows as a
LayerNorm does, with the standard deviation of a sample. The folder's name gives the place, the file's the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, needed, place_and_text, sizes
from sae_training.machine.precision import at_least_float32

ENCODER = ("pre_bias", "latent_bias", "encoder.weight")
DECODERS = ("decoder.weight", "decoder.linear.weight")  # the second is the encoder's own weight, (n, d)

HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
"""Their locations (paths.py of the package), and the hooks of TransformerLens."""

NAME = re.compile(rf"({'|'.join(HOOKS)})(?:_v\d+(?:_\w+)?)?")


def recognises(found: Found) -> bool:
    return found.is_pickle and isinstance(content := found.pickle(), dict) and content.keys() >= {*ENCODER}


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The autoencoder of the file. ValueError for activations that are not read, and for a k that is missing."""
    path, state = found.path, found.pickle()
    decoder = next((name for name in DECODERS if name in state), None)
    if decoder is None:
        raise ValueError(f"{path}: decoder.weight is missing; it holds {', '.join(map(str, state))}.")
    activation = state.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise ValueError(f"{path}: activation: found {activation!r}, expected ReLU or TopK.")
    d_sae, d_in = state["encoder.weight"].shape
    dtype = str(state["encoder.weight"].dtype).removeprefix("torch.")
    values = (
        sizes(d_in, d_sae)
        | place(path, given)
        | {
            "architecture": "standard",
            "model_processing": "none",
            "file_format": "openai",
            "file_dtype": dtype,
            "dtype": "float64" if dtype == "float64" else "float32",
        }
    )
    if activation == "TopK":
        values |= {"architecture": "topk", "normalize_activations": "layer_norm_unbiased"}
        values["k"] = needed(given.k, k_of(state, path), "activation_state_dict.k", "k", path)
    convention = "activations are in the units of normalised rows" if activation == "TopK" else Loaded.convention
    return {path.stem: Loaded(values, partial(weights, state, decoder), convention=convention)}


def k_of(state: Mapping[str, Any], path: Path) -> int | None:
    options = state.get("activation_state_dict") or {}
    after = options.get("postact_fn", "ReLU")
    if after != "ReLU":
        raise ValueError(
            f"{path}: postact_fn: found {after!r}, expected ReLU: the largest k of a row are not cut at 0, which no "
            "architecture here does."
        )
    return int(options["k"]) if "k" in options else None


def place(path: Path, given: Given) -> dict[str, Any]:
    """Where activations come from, by the names of the folders; the published files are all of GPT-2 small."""
    named = [found for part in path.absolute().parent.parts[-3:] if (found := NAME.fullmatch(part))]
    if not named or not path.stem.isdecimal():
        return place_and_text(given)
    layer = int(path.stem)
    return place_and_text(given, "gpt2-small", f"blocks.{layer}.{HOOKS[named[-1][1]]}", layer)


def weights(state: Mapping[str, Any], decoder: str) -> dict[str, Tensor]:
    theirs = {
        name: state[name].detach().to(at_least_float32(state[name].dtype), copy=True) for name in (*ENCODER, decoder)
    }
    return {
        "W_enc": theirs["encoder.weight"].T,
        "b_enc": theirs["latent_bias"],
        "W_dec": theirs[decoder] if decoder == "decoder.linear.weight" else theirs[decoder].T.contiguous(),
        "b_dec": theirs["pre_bias"],
    }
