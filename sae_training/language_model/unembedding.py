"""The weights that lead from a place in the language model to its logits, and what the neurons of a layer write there.

They are those of the model, in its own precision, so that a file of them is as small as can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sae_training.language_model.model_parts import ModelParts
from sae_training.language_model.sites import HookSite

IN_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "hook_embed")
"""Ends of the names of hooks whose tensor is, or is added to, the residual stream."""


def tensors_of(model: Any, sites: Iterable[HookSite]) -> Mapping[str, Tensor]:
    """Return the weights that `to_logits` and `neurons` need for these sites, by name.

    head: (d_vocab, d_model), the unembedding; norm: (d_model,), float32, the final norm's weight; is_centred: whether
    that norm subtracts the mean; W_out.L: (d_mlp, d_model), of layer L; W_O.L: (heads, d_head, d_model).
    A model without an unembedding has no head.
    """
    if isinstance(model, ModelParts):
        return model.tensors
    found: dict[str, Tensor] = {}
    if (W_U := weight_of(model, "W_U")) is not None:
        found["head"] = W_U.T
        found["is_centred"] = torch.tensor(str(model.cfg.normalization_type or "").startswith("LN"))
    norm = getattr(model, "ln_final", None)
    if (weight := weight_of(norm, "w", "weight")) is not None:
        # A bridge has Hugging Face's weights, and Gemma's norms multiply by 1 + weight. HookedTransformer has the sum.
        found["norm"] = weight.float() + (1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0)
    for site in sites:
        block = None if site.layer is None else model.blocks[site.layer]
        if site.name.endswith((*IN_THE_STREAM, "mlp.hook_post")):
            W_out = weight_of(getattr(block, "mlp", None), "W_out")
            if W_out is not None and W_out.ndim == 2:  # not of experts
                found[f"W_out.{site.layer}"] = W_out
        if site.name.endswith("attn.hook_z") and (W_O := weight_of(getattr(block, "attn", None), "W_O")) is not None:
            found[f"W_O.{site.layer}"] = W_O
    # In one order in memory, in which a file has them too: sums round otherwise in another. On one device, too.
    return {name: tensor.detach().to(model.cfg.device).contiguous() for name, tensor in found.items()}


def weight_of(module: Any, *names: str) -> Tensor | None:
    """Return the first of these weights that the module has and can show (one of 4 bits it cannot)."""
    for name in names:
        with suppress(Exception):  # because TransformerLens raises errors of many kinds
            if isinstance(found := getattr(module, name), Tensor):
                return found
    return None


def to_logits(tensors: Mapping[str, Tensor], site: HookSite) -> Tensor | None:
    """Return (d_out, d_vocab): what a vector at `site` adds to the logits, if nothing after it changed.

    None where that is not known, or the model has no unembedding.
    """
    if "head" not in tensors:
        return None
    if site.name.endswith(IN_THE_STREAM):
        return unembedding(tensors)
    written = W_out(tensors, site) if site.name.endswith("mlp.hook_post") else None
    if site.name.endswith("attn.hook_z") and f"W_O.{site.layer}" in tensors:
        W_O = tensors[f"W_O.{site.layer}"].float()  # (heads, d_head, d_model)
        written = W_O.flatten(0, 1) if site.head_index is None else W_O[site.head_index]
    return None if written is None else written @ unembedding(tensors)


def unembedding(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return (d_model, d_vocab): the final norm's weight times the unembedding. KeyError if there is none."""
    table = tensors["head"].T.float()
    if "norm" in tensors:
        table = tensors["norm"].unsqueeze(1) * table
    return table - table.mean(dim=0) if tensors["is_centred"] else table


def neurons(tensors: Mapping[str, Tensor], site: HookSite) -> Tensor | None:
    """Return (n, d_out): what each neuron of the site's layer writes there; None where that is not known."""
    if site.name.endswith("mlp.hook_post"):
        return torch.eye(site.d_in)
    return W_out(tensors, site) if site.name.endswith(IN_THE_STREAM) else None


def W_out(tensors: Mapping[str, Tensor], site: HookSite) -> Tensor | None:
    """Return (d_mlp, d_model): what the neurons of the site's layer write; None without a layer, or with experts."""
    found = tensors.get(f"W_out.{site.layer}")
    return None if found is None else found.float()
