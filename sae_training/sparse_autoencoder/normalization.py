"""Activations brought to one size, each by itself, before they are encoded; reconstructions brought back.

    layer_norm   (x - mean(x)) / std(x), as a LayerNorm without its weights
    unit_norm    x * sqrt(d_in) / |x|

Both leave a row with norm sqrt(d_in), the size that `expected_average_only_in` gives rows on average. That one is a
single factor, which the saved weights absorb; these differ from row to row, so the autoencoder itself carries them, and
decoding takes the activations too. (SAELens keeps them from the last `encode`, and decodes with whatever that was.)
"""

from __future__ import annotations

import torch
from torch import Tensor

BY_ROW = ("layer_norm", "unit_norm")
EPSILON = 1e-5  # added to a row's root mean square: rows of zeros stay zeros


def normalize(x: Tensor, mode: str) -> Tensor:
    """Rows (..., d_in) of norm sqrt(d_in), in float32 at least; as they are if the mode is not one of BY_ROW."""
    if mode not in BY_ROW:
        return x
    mean, size = centre_and_size(x, mode)
    return (x - mean) / size


def restore(rows: Tensor, x: Tensor, mode: str) -> Tensor:
    """What `rows` (..., d_in) in the units of `normalize(x, mode)` are in the units of `x`."""
    if mode not in BY_ROW:
        return rows
    mean, size = centre_and_size(x, mode)
    return (rows * size + mean).to(rows.dtype)


def centre_and_size(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Each (..., 1), in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dim=-1, keepdim=True) if mode == "layer_norm" else torch.zeros_like(x[..., :1])
    return mean, (x - mean).pow(2).mean(dim=-1, keepdim=True).sqrt() + EPSILON
