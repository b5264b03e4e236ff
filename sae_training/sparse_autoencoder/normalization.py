"""Normalise activations row by row before they are encoded, and bring reconstructions back to the rows' sizes.

    layer_norm             (x - mean(x)) / std(x), as a LayerNorm without its weights
    unit_norm              x * sqrt(d_in) / |x|
    layer_norm_unbiased    as layer_norm, with the standard deviation of a sample (over d_in - 1), as in the files of
                           SAELens and OpenAI, and brought back by the deviation alone, without EPSILON
    constant_norm_rescale  as unit_norm, without EPSILON: a row of zeros has no size there, and stays zero here

They give every row the norm sqrt(d_in) (layer_norm_unbiased: sqrt(d_in - 1)), which `expected_average_only_in` gives
rows on average. That mode is one factor for all rows, so the saved weights absorb it. These factors differ from row to
row, so the autoencoder applies them itself, and decoding needs the activations too. (SAELens keeps the factors of the
last `encode` for the next `decode`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.machine.precision import at_least_float32

BY_ROW = ("layer_norm", "unit_norm", "layer_norm_unbiased", "constant_norm_rescale")
CENTRED = ("layer_norm", "layer_norm_unbiased")
EPSILON = 1e-5  # added to a row's root mean square, so that rows of zeros stay zeros


def normalize(x: Tensor, mode: str) -> Tensor:
    """Rows (..., d_in) with norm sqrt(d_in), in float32 at least; `x` itself if the mode is not one of BY_ROW."""
    if mode not in BY_ROW:
        return x
    mean, size = centre_and_size(x, mode)
    return (x - mean) / (size + EPSILON if mode == "layer_norm_unbiased" else size)


def restore(rows: Tensor, x: Tensor, mode: str) -> Tensor:
    """`rows` (..., d_in), given in the units of `normalize(x, mode)`, in the units of `x`."""
    if mode not in BY_ROW:
        return rows
    mean, size = centre_and_size(x, mode)
    return (rows * size + mean).to(rows.dtype)


def centre_and_size(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The mean that `mode` subtracts from each row and its size, both (..., 1) in float32 at least."""
    x = x.to(at_least_float32(x.dtype))
    mean = x.mean(dim=-1, keepdim=True) if mode in CENTRED else torch.zeros_like(x[..., :1])
    match mode:
        case "layer_norm_unbiased":
            return mean, x.std(dim=-1, keepdim=True)
        case "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return mean, torch.where(size > 0, size, 1.0)
        case _:
            return mean, (x - mean).pow(2).mean(dim=-1, keepdim=True).sqrt() + EPSILON
