"""What an analysis needs of the language model beside its passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_analysis.logit_lens import unembedding
from sae_analysis.pieces import pieces_of
from sae_training.language_model.sites import HookSite
from sae_training.language_model.tokenizer import tokenizer_of

IN_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "hook_embed")
"""Ends of the names of hooks whose tensor is, or is added to, the residual stream."""


@dataclass(frozen=True)
class OfModel:
    """None: the model has none, or not at this place."""

    pieces: list[bytes]
    """The bytes of each token id."""
    unembedding: Tensor | None
    """(d_out, d_vocab): from the place that the autoencoder writes to, to the logits."""
    neurons: Tensor | None
    """(n, d_out): what each neuron of the layer writes there."""


def of_model(model: Any, site: HookSite) -> OfModel:
    """Return it for an autoencoder that writes to `site`."""
    pieces = pieces_of(tokenizer_of(model), model.cfg.d_vocab)
    written = into_the_stream(model, site)
    table = None if written is None else written @ unembedding(model)
    if site.name.endswith("mlp.hook_post"):
        neurons = torch.eye(site.d_in)
    else:
        neurons = W_out(model, site.layer) if site.name.endswith(IN_THE_STREAM) else None
    return OfModel(pieces, table, neurons)


def into_the_stream(model: Any, site: HookSite) -> Tensor | None:
    """Return (d_out, d_model): what a vector at `site` adds to the residual stream; None where that is not known."""
    if site.name.endswith(IN_THE_STREAM):
        return torch.eye(site.d_in)
    if site.name.endswith("mlp.hook_post"):
        return W_out(model, site.layer)
    if site.name.endswith("attn.hook_z") and site.layer is not None:
        W_O = model.blocks[site.layer].attn.W_O.detach().float()  # (heads, d_head, d_model)
        return W_O.flatten(0, 1) if site.head_index is None else W_O[site.head_index]
    return None


def W_out(model: Any, layer: int | None) -> Tensor | None:
    """Return (d_mlp, d_model): what the neurons of a layer write; None without a layer, or with experts."""
    found = None if layer is None else getattr(model.blocks[layer].mlp, "W_out", None)
    return found.detach().float() if isinstance(found, Tensor) and found.ndim == 2 else None
