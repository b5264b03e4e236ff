"""Figures of a tensor that is seen a slice at a time: range, zeros, values that are no numbers, norms by latent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

TIED = "decoder.linear.weight"  # the encoder's matrix under the name of the decoder

NUMBER = re.compile(r"[._]\d+$")  # of a layer, W_dec_3 or W_D.3

DECODERS = ("W_dec", "w_dec", "decoder.weight", "decoder_linear.weight", "W_D", "D", TIED)
"""How programs name the matrix of the latents' directions."""

DEAD_BELOW = 1e-6
"""A decoder row is dead if its norm is at most this, relative to the median norm."""


@torch.no_grad()
def figures(slices: Iterable[tuple[int, Tensor]], shape: tuple[int, ...], latents: int | None, name: str) -> Any:
    """values, zeros (a share), nan, infinite, least, largest of a tensor; of a decoder also the norms of its rows.

    `slices` are its rows with the index of their first; `latents` is how many rows a decoder has, None if unknown.
    """
    axis = latent_axis(name, shape, latents)
    squares = None if axis is None or 0 in shape else torch.zeros(shape[axis], dtype=torch.float64)
    values = zeros = nan = infinite = 0
    least, largest = math.inf, -math.inf
    for first, part in slices:
        values += part.numel()
        zeros += part.numel() - int(part.count_nonzero())
        if part.is_floating_point():
            nan += int(part.isnan().sum())
            infinite += int(part.isinf().sum())
            part = part.float().nan_to_num(0.0, 0.0, 0.0) if part.dtype != torch.float64 else part.nan_to_num(0, 0, 0)
        if part.numel():
            least, largest = min(least, float(part.min())), max(largest, float(part.max()))
        if squares is not None and axis == 0:
            squares[first : first + len(part)] = norms_by(part, 0)
        elif squares is not None and axis is not None:
            squares += norms_by(part, axis)
    told: dict[str, Any] = {"values": values, "zeros": zeros / max(1, values), "nan": nan, "infinite": infinite}
    told |= {"least": least if values else None, "largest": largest if values else None}
    if squares is not None and len(squares):
        told["decoder_norms"] = distribution(squares.sqrt())
    return told


def latent_axis(name: str, shape: tuple[int, ...], latents: int | None) -> int | None:
    """The axis of a decoder that counts latents. For square ones the name tells: a Linear's weight has them last."""
    name = NUMBER.sub("", name)
    last = name.rpartition(".")[2]
    is_decoder = name.endswith(DECODERS) if "." in name else last in DECODERS
    if not is_decoder or len(shape) < 2 or latents not in shape:
        return None
    fitting = [axis for axis, size in enumerate(shape) if size == latents]
    return fitting[-1] if name.endswith(".weight") and not name.endswith(TIED) else fitting[0]


def norms_by(part: Tensor, axis: int) -> Tensor:
    """Sums of squares (size of `axis`) over all other axes, in float32 a slice at a time."""
    others = [other for other in range(part.dim()) if other != axis]
    return part.square().sum(dim=others).double()


def distribution(norms: Tensor) -> dict[str, Any]:
    median = float(norms.median())
    return {
        "least": float(norms.min()),
        "median": median,
        "mean": float(norms.mean()),
        "largest": float(norms.max()),
        "dead": int((norms <= DEAD_BELOW * median).sum()),
    }
