"""Files of OpenAI's sparse_autoencoder, versions 1 to 5 for GPT-2 small: a .pt for each layer, strings among tensors.

Versions 1 and 4 are ReLU on raw activations. Version 5 is TopK on rows that are normalised first, (x - mean) / (std +
1e-5) with the deviation of a sample, and brought back by mean and std. The path names the place and the layer, not the
function: this is told by the content, so that versions 2 and 3, of which no files are public, are read by the same
rules. A file that names no activation is ReLU, as those before June 2024. Identity, alone or after TopK, keeps what is
below 0. OpenAI's loader takes all other names for ReLU without a word; they are refused here.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, needed, place_and_text, precisions, sizes
from sae_training.formats.pickles import copied

TENSORS = ("pre_bias", "latent_bias", "encoder.weight")
DECODERS = ("decoder.weight", "decoder.linear.weight")
"""(d_in, d_sae), and of tied weights the encoder's own, (d_sae, d_in)."""

COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""Tensors of training that compute nothing."""

ARCHITECTURES = {
    ("ReLU", "none"): "standard",
    ("Identity", "none"): "linear",
    ("TopK", "ReLU"): "topk",
    ("TopK", "Identity"): "lineartopk",
}
"""By `activation`, and by `postact_fn` of a TopK."""

PLACES = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def recognises(found: Found) -> bool:
    if not found.is_pickle:
        return False
    content = found.pickle()
    return isinstance(content, dict) and {*TENSORS} <= content.keys()


def read(found: Found, given: Given) -> dict[str, Loaded]:
    content, path = found.pickle(), found.path
    decoder = next((name for name in DECODERS if name in content), None)
    if decoder is None:
        raise ValueError(f"{path}: decoder.weight is missing; use a complete copy.")
    check_others(content, decoder, path)
    d_sae, d_in = content["encoder.weight"].shape
    values = sizes(d_in, d_sae) | place(path, given) | activation(content, path, given)
    dtype = str(content["encoder.weight"].dtype).removeprefix("torch.")
    values |= {"model_processing": "none", "file_format": "openai", **precisions(dtype)}
    about = "activations are in the units of normalised rows" if "k" in values else Loaded.convention
    return {path.name.split(".")[0]: Loaded(values, partial(weights, content, decoder), convention=about)}


def check_others(content: dict[str, Any], decoder: str, path: Path) -> None:
    """ValueError for tensors beside those that are read, as they might change what the autoencoder computes."""
    known = {*TENSORS, *COUNTERS, decoder}
    unknown = [str(name) for name, value in content.items() if isinstance(value, Tensor) and name not in known]
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)}: not a tensor of openai's that is read; use a copy without.")


def activation(content: dict[str, Any], path: Path, given: Given) -> dict[str, Any]:
    """The function by the names of its parts; only TopK normalises rows. ValueError for names that are not known."""
    name, state = content.get("activation", "ReLU"), content.get("activation_state_dict") or {}
    after = state.get("postact_fn", "ReLU") if name == "TopK" else "none"
    architecture = ARCHITECTURES.get((name, after))
    if architecture is None:
        raise ValueError(
            f"{path}: activation: found {name} with postact_fn {after}, expected ReLU, Identity, or TopK with one of "
            "these as postact_fn; other names do not say what is computed (OpenAI's loader takes them for ReLU)."
        )
    if name != "TopK":
        return {"architecture": architecture}
    k = needed(given.k, state.get("k"), "activation_state_dict.k", "k", path)
    return {"architecture": architecture, "k": k, "normalize_activations": "layer_norm_unbiased"}


def place(path: Path, given: Given) -> dict[str, Any]:
    """From {location}_v5_32k/autoencoders/{layer}.pt."""
    parts = path.absolute().parts
    location = next((re.sub(r"_v\d+(_\d+k)?$", "", part) for part in reversed(parts[:-1]) if known(part)), None)
    layer = int(path.stem) if location and path.stem.isdecimal() else None
    hook_point = f"blocks.{layer}.{PLACES[location]}" if location and layer is not None else None
    return place_and_text(given, None, hook_point, layer)


def known(part: str) -> bool:
    return re.sub(r"_v\d+(_\d+k)?$", "", part) in PLACES


def weights(content: dict[str, Any], decoder: str) -> dict[str, Tensor]:
    names = {"pre_bias": "b_dec", "latent_bias": "b_enc", "encoder.weight": "W_enc", decoder: "W_dec"}
    ours = {name: copied(content[theirs], theirs == "decoder.weight") for theirs, name in names.items()}
    ours["W_enc"] = ours["W_enc"].T
    return ours
