"""Normalise activations row by row before they are encoded, and bring reconstructions back to the rows' sizes.

    layer_norm   (x - mean(x)) / std(x), as a LayerNorm without its weights
    unit_norm    x * sqrt(d_in) / |x|

Both give every row the norm sqrt(d_in), which `expected_average_only_in` gives rows on average. That mode is one factor
for all rows, so the saved weights absorb it. These factors differ from row to row, so the autoencoder applies them
itself, and decoding needs the activations too. (SAELens keeps the factors of the last `encode` for the next `decode`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.machine.precision import at_least_float32

BY_ROW = ("layer_norm", "unit_norm")
EPSILON = 1e-5  # added to a row's root mean square, so that rows of zeros stay zeros


def normalize(x: Tensor, mode: str) -> Tensor:
    """Rows (..., d_in) with norm sqrt(d_in), in float32 at least; `x` itself if the mode is not one of BY_ROW."""
    if mode not in BY_ROW:
        return x
    mean, size = centre_and_size(x, mode)
    return (x - mean) / size


def restore(rows: Tensor, x: Tensor, mode: str) -> Tensor:
    """`rows` (..., d_in), given in the units of `normalize(x, mode)`, in the units of `x`."""
    if mode not in BY_ROW:
        return rows
    mean, size = centre_and_size(x, mode)
    return (rows * size + mean).to(rows.dtype)


def centre_and_size(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The mean that `mode` subtracts from each row and the size it divides by, both (..., 1) in float32 at least."""
    x = x.to(at_least_float32(x.dtype))
    mean = x.mean(dim=-1, keepdim=True) if mode == "layer_norm" else torch.zeros_like(x[..., :1])
    return mean, (x - mean).pow(2).mean(dim=-1, keepdim=True).sqrt() + EPSILON
