"""Mixed precision: a step computes in `cfg.dtype` with copies of the weights, which are float32 at least themselves.

Gradients come back to the float32 weights, and moments and averages are float32 like them (Micikevicius et al. 2018,
arXiv 1710.03740). In bfloat16, whose numbers near 1 lie 1/128 apart, an update of a weight by lr = 1e-4 would be
rounded away: thresholds of jumprelu would end where they began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Losses

STAYS_WIDE = ("b_dec", "log_threshold")
"""The parameters that have no narrow copy: b_dec is subtracted from rows that may lie far from 0, and the threshold of
jumprelu is compared with pre-activations. Both cost next to nothing."""


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype in which a step cannot compute."""
    if dtype == torch.float16:
        raise ValueError(
            "dtype: found float16, expected float32, bfloat16 or float64 to train in. The loss is a mean over all "
            "elements of a batch, so that its gradients lie below float16's smallest number (6e-8), and large "
            "activations lie above its largest (65504). Use bfloat16, which takes the same memory; or keep float32 "
            "and set encoder_matmul_dtype to float16, which gives the encoder's product float16's speed."
        )


class Holder(nn.Module):
    """Gives `functional_call` a module to call."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, function: Callable[[SparseAutoencoder], Losses]) -> Losses:
        return function(self.sae)


def in_dtype(dtype: torch.dtype, sae: SparseAutoencoder, function: Callable[[SparseAutoencoder], Losses]) -> Losses:
    """Return function(sae), computed with copies of the weights in `dtype`; gradients reach the weights themselves."""
    if dtype == sae.dtype:
        return function(sae)
    copies: dict[str, Any] = {
        f"sae.{name}": weight.to(dtype) for name, weight in sae.named_parameters() if name not in STAYS_WIDE
    }
    return functional_call(Holder(sae), copies, (function,))
