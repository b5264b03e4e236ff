"""Which latents are active: the encoder's product and the choice among its outputs, in pieces that stay in cache.

The pre-activations of a batch are (rows, d_sae), by far the largest tensor of a step, and nothing here ever holds more
than a tile of them: 4 MB in bfloat16, 128 MB on a GPU. No gradient flows through a choice, so the tile can be in a
lower precision than the weights; the values at the chosen latents are computed again in full
(`sparse_code.PreActivations`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_training.sparse_code import Entries, fixed_size_entries, offsets_of

TILE_ELEMENTS = 2**21
TILE_LATENTS = 8192
GPU_TILE_ELEMENTS = 2**26  # all latents of a few hundred rows: large products, few launches
SAMPLE_ROWS = 32  # from which `top_k_of_batch` estimates its threshold
TOO_DENSE = 0.2
"""Share of active latents from which a step is done densely.

Time of a sparse ReLU step over that of a dense one, d_in 512, batch 4096, 2 CPU cores, d_sae 4096 / 8192: at a share of
0.05 0.25 / 0.24, at 0.1 0.46 / 0.50, at 0.15 0.63 / 0.71, at 0.2 0.86 / 0.89, at 0.3 1.04 / 1.17.
"""


class Encoder:
    """The encoder's weights in the precision of the product, for one batch `sae_in` (rows, d_in)."""

    def __init__(self, sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype) -> None:
        self.sae_in = sae_in.to(dtype)
        self.table = W_enc.T.to(dtype)
        self.bias = b_enc.to(dtype)
        self.d_sae = W_enc.shape[1]
        on_gpu = sae_in.is_cuda
        self.tile_latents = self.d_sae if on_gpu else min(self.d_sae, TILE_LATENTS)
        self.tile_rows = max(1, (GPU_TILE_ELEMENTS if on_gpu else TILE_ELEMENTS) // self.tile_latents)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of sae_in), `tile_rows` at a time."""
        for start in range(0, len(self.sae_in), self.tile_rows):
            yield start, self.sae_in[start : start + self.tile_rows]

    def tiles(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first latent, pre-activations (rows, tile_latents)) for a chunk of rows."""
        for start in range(0, self.d_sae, self.tile_latents):
            tile = slice(start, start + self.tile_latents)
            yield start, torch.addmm(self.bias[tile], rows, self.table[tile].T)


# --------------------------------------------------------------------------------------------------- k of each row


def top_k_of_rows(encoder: Encoder, k: int) -> Entries:
    """The k latents with the largest pre-activations on each row."""
    chosen = []
    for _, rows in encoder.chunks():
        best = [(start, *top_k(tile, k)) for start, tile in encoder.tiles(rows)]
        if len(best) == 1:
            chosen.append(best[0][2])
            continue
        values = torch.cat([values for _, values, _ in best], dim=1)
        latents = torch.cat([latents + start for start, _, latents in best], dim=1)
        chosen.append(latents.gather(1, values.topk(k, dim=1, sorted=False).indices))
    return fixed_size_entries(torch.cat(chosen), encoder.d_sae)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of each row of `x` (rows, n), in no order; all of them if n <= k.

    The k largest numbers lie in the k groups with the largest maxima, so a row of 8,192 is brought down to 256 maxima,
    then to 32 groups of 32, and these in the same way: three times faster on a CPU than `topk` of the whole row. With
    groups j, j + n_groups, j + 2 n_groups, ... the maximum is one of whole vectors.
    """
    n_rows, n = x.shape
    k = min(k, n)
    n_groups = n
    while n_groups % 2 == 0 and n_groups // 2 >= max(256, 4 * k):
        n_groups //= 2
    if n_groups == n or x.is_cuda:
        return x.topk(k, dim=1, sorted=False)
    grouped = x.view(n_rows, -1, n_groups)
    best = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, best.unsqueeze(1).expand(-1, grouped.shape[1], -1)).flatten(start_dim=1)
    values, places = top_k(candidates, k)
    member, which = places // k, places % k
    return values, member * n_groups + best.gather(1, which)


# --------------------------------------------------------------------------------------------------- by a threshold


def above_threshold(encoder: Encoder, threshold: Tensor | float) -> Entries | None:
    """All latents with a pre-activation above `threshold` (a number, or one per latent (d_sae,)).

    None if there are so many of them that dense products are cheaper: the first chunk of rows, a random sample of the
    batch, decides.
    """
    keys = []
    for first_row, rows in encoder.chunks():
        keys.append(keys_above(encoder, first_row, rows, threshold))
        if first_row == 0 and len(keys[0]) > TOO_DENSE * len(rows) * encoder.d_sae:
            return None
    return entries_from_keys(torch.cat(keys), len(encoder.sae_in), encoder.d_sae)


def keys_above(encoder: Encoder, first_row: int, rows: Tensor, threshold: Tensor | float) -> Tensor:
    """row * d_sae + latent of each pre-activation above the threshold, ascending, (n,) int64."""
    keys = []
    for first_latent, tile in encoder.tiles(rows):
        limit = threshold
        if isinstance(threshold, Tensor):
            limit = threshold[first_latent : first_latent + tile.shape[1]].to(tile.dtype)
        keys.append(keys_of_tile(tile > limit, first_row, first_latent, encoder.d_sae))
    return keys[0] if len(keys) == 1 else torch.cat(keys).sort().values


def keys_of_tile(mask: Tensor, first_row: int, first_latent: int, d_sae: int) -> Tensor:
    """row * d_sae + latent of each place that is true in the mask of a tile, row after row."""
    row, latent = mask.nonzero(as_tuple=True)
    return (row + first_row) * d_sae + latent + first_latent


def entries_from_keys(keys: Tensor, n_rows: int, d_sae: int) -> Entries:
    """Entries from ascending keys row * d_sae + latent."""
    rows = keys // d_sae
    return Entries(keys - rows * d_sae, offsets_of(rows, n_rows), d_sae)


# -------------------------------------------------------------------------------------------------- k to a row, in all


def top_k_of_batch(encoder: Encoder, k: int) -> Entries:
    """The k * rows largest positive pre-activations of the whole batch (Bussmann et al. 2024).

    A few rows give a low estimate of the smallest one kept; whatever lies above it in any row is
    collected, and the largest of these are the answer. Should the estimate prove too high, 0 takes its place.
    """
    n_rows = len(encoder.sae_in)
    wanted = k * n_rows
    _, first = next(encoder.chunks())
    first = first[:SAMPLE_ROWS]
    sample = torch.cat([tile.flatten() for _, tile in encoder.tiles(first)])
    low = largest(sample, 2 * k * len(first)).clamp_min(0)
    keys, values = collect(encoder, low)
    if len(keys) < wanted:
        keys, values = collect(encoder, torch.zeros_like(low))
    if len(keys) > wanted:
        keys = keys[values.topk(wanted, sorted=False).indices]
    return entries_from_keys(keys.sort().values, n_rows, encoder.d_sae)


def largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of `values`, or their smallest if there are fewer."""
    n = min(n, len(values))
    return values.float().kthvalue(len(values) - n + 1).values.to(values.dtype)


def collect(encoder: Encoder, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the pre-activations above one threshold for all latents."""
    keys, values = [], []
    for first_row, rows in encoder.chunks():
        for first_latent, tile in encoder.tiles(rows):
            mask = tile > threshold
            keys.append(keys_of_tile(mask, first_row, first_latent, encoder.d_sae))
            values.append(tile[mask])
    return torch.cat(keys), torch.cat(values)
