"""The logit lens: what a latent's direction adds to the logits, if nothing after the hook changed it.

logits[latent] = norm(W_dec[latent]) @ W_U, where `norm` is the part of the final norm that does not depend on the rest
of the residual stream: its weight, and for LayerNorm the subtraction of the mean (nostalgebraist 2020; Bloom and Lin
2024). The mean over the vocabulary is subtracted, because it changes no probability, and processed models lack it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_training.kernels.selection import highest

N_BINS = 40
CHUNK = 2**25  # logits of one product
TILE = 2**20  # logits that all else is done to at once, so that they stay in the cache: in a third of the time


class Lens(NamedTuple):
    """What each latent does to the logits; `n` tokens a side."""

    top: np.ndarray
    """(d_sae, n): the token ids with the highest logits, highest first."""
    top_values: np.ndarray
    bottom: np.ndarray
    """(d_sae, n): the lowest, lowest first."""
    bottom_values: np.ndarray
    skew: np.ndarray
    """(d_sae,): of the logits over the vocabulary; NaN where all are the same."""
    kurtosis: np.ndarray
    """3 for a normal distribution."""
    counts: np.ndarray
    """(d_sae, N_BINS): histogram over the vocabulary."""
    edges: np.ndarray
    """(d_sae, 2): its lowest and highest edge; bins are of one width."""


@torch.no_grad()
def logit_lens(directions: Tensor, table: Tensor, n: int = 10) -> Lens:
    """Return what each of `directions` (d_sae, d_model) does to the logits, through `table` (d_model, d_vocab)."""
    d_vocab = table.shape[1]
    n = min(n, d_vocab)
    found: list[np.ndarray] = []
    start = 0
    for some in directions.float().split(max(1, CHUNK // d_vocab)):
        for logits in (some @ table).split(max(1, TILE // d_vocab)):
            parts = [part.cpu().numpy() for part in lens_of(logits, n)]
            # Filled in place: small results between large products would keep the allocator from reusing memory.
            found = found or [np.empty((len(directions), *part.shape[1:]), dtype=part.dtype) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[start : start + len(part)] = part
            start += len(logits)
    return Lens(*found)


def lens_of(logits: Tensor, n: int) -> tuple[Tensor, ...]:
    """Return the fields of `Lens` for the `logits` (latents, d_vocab) of some latents, which are changed in place."""
    logits -= logits.mean(dim=1, keepdim=True)
    top, top_values = highest(logits, n)
    bottom, bottom_values = highest(-logits, n)
    low, high = -bottom_values[:, :1], top_values[:, :1]
    squares = logits * logits
    variance = squares.mean(dim=1, dtype=torch.float64)
    skew = (squares * logits).mean(dim=1, dtype=torch.float64) / variance**1.5
    kurtosis = squares.mul_(squares).mean(dim=1, dtype=torch.float64) / variance**2
    moments = torch.where((variance <= 0).unsqueeze(1), torch.nan, torch.stack([skew, kurtosis], dim=1))
    bins = ((logits - low) * (N_BINS / (high - low).clamp_min(1e-30))).int().clamp_(max=N_BINS - 1)
    bins += torch.arange(len(logits), dtype=torch.int32, device=bins.device).unsqueeze(1) * N_BINS
    counts = torch.bincount(bins.flatten(), minlength=len(logits) * N_BINS).view(len(logits), N_BINS)
    return top, top_values, bottom, -bottom_values, *moments.unbind(1), counts, torch.cat([low, high], dim=1)
