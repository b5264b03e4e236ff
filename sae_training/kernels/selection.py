"""Choose the active latents: the encoder's product and the choice among its outputs, in tiles that stay in cache.

The pre-activations of a batch are (rows, d_sae), by far the largest tensor of a step. Nothing here holds more than one
tile of them: 4 MB in bfloat16 on a CPU, 128 MB on a GPU. No gradient flows through a choice, so tiles can be in a lower
precision than the weights; the values at the chosen latents are computed again in full precision
(`sparse_code.PreActivations`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_training.kernels import cpu, triton_selection
from sae_training.kernels.sparse_code import Code, Entries, concatenate, fixed_size_entries, offsets_of
from sae_training.machine.precision import at_least_float32
from sae_training.parallel.block import ALL, Block
from sae_training.parallel.shard import WHOLE, Shard

TILE_ELEMENTS = 2**21  # of a tile on a CPU
TILE_LATENTS = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 2048, torch.float64: 2048}
"""Latents of a tile on a CPU, by precision.

Product and choice for 4096 rows, d_in 512, d_sae 8192, with tiles of 8192 / 2048 latents: 120 / 148 ms in bfloat16,
362 / 290 ms in float32, because float32 products repack the weights for every tile and wide tiles have few rows.
"""
GPU_TILE_ELEMENTS = 2**26  # all latents of some hundred rows, for large products and few launches
SAMPLE_ROWS = 32  # `top_k_of_batch` estimates its threshold from so many
EXCESS = (2, 8)
"""How many times as many entries as are kept the estimates are made for; among few rows, one with many large values
(BOS) makes the first too high: of 51,200 entries wanted, all 3.5 million above 0 were collected."""
TOO_DENSE = 0.2
"""Share of active latents above which a step goes the dense way.

Time of a sparse ReLU step over that of a dense one (d_in 512, batch 4096, 2 CPU cores, d_sae 4096 / 8192), by the share
of active latents: 0.05: 0.25 / 0.24; 0.1: 0.46 / 0.50; 0.15: 0.63 / 0.71; 0.2: 0.86 / 0.89; 0.3: 1.04 / 1.17.
"""


class Encoder:
    """The encoder's product for one batch `sae_in` (rows, d_in), with weights in precision `dtype`, tile by tile."""

    def __init__(
        self,
        sae_in: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        dtype: torch.dtype,
        tile_latents: int | None = None,
        tile_rows: int | None = None,
    ) -> None:
        self.sae_in = sae_in.to(dtype)
        self.table = W_enc.T.to(dtype)
        self.bias = b_enc
        self.d_sae = W_enc.shape[1]
        on_gpu = sae_in.is_cuda
        most = max(1, self.d_sae)  # there are none where no latent here is dead
        self.tile_latents = min(most, tile_latents or (most if on_gpu else TILE_LATENTS[dtype]))
        self.tile_rows = tile_rows or max(1, (GPU_TILE_ELEMENTS if on_gpu else TILE_ELEMENTS) // self.tile_latents)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of sae_in), `tile_rows` at a time."""
        for start in range(0, len(self.sae_in), self.tile_rows):
            yield start, self.sae_in[start : start + self.tile_rows]

    def tiles(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first latent, product (rows, tile_latents), bias (tile_latents,)) for a chunk of rows.

        The bias is separate because a product that adds it takes a tenth longer on a CPU, and `cpu` adds it for free.
        """
        for start in range(0, self.d_sae, self.tile_latents):
            tile = slice(start, start + self.tile_latents)
            yield start, rows @ self.table[tile].T, self.bias[tile]


# --------------------------------------------------------------------------------------------------- k of each row


def top_k_of_rows(encoder: Encoder, k: int, shard: Shard = WHOLE) -> Entries:
    """The k latents with the largest pre-activations on each row; of a `shard`, those that are among all ranks' k."""
    if not shard.is_all:
        found = [best_latents(encoder, rows, k) for _, rows in encoder.chunks()]
        latents, order = torch.cat([latents for latents, _ in found]).sort(dim=1)
        values = torch.cat([values for _, values in found]).gather(1, order)
        return entries_where(shard.among_largest(values, k), latents, encoder.d_sae)
    if triton_selection.supports(encoder.sae_in, encoder.d_sae, k):
        chunks = [triton_selection.encode_top_k(rows, encoder.table, encoder.bias, k) for _, rows in encoder.chunks()]
        return fixed_size_entries(torch.cat(chunks), encoder.d_sae)
    if encoder.tile_latents == encoder.d_sae:  # one tile has all latents of a row
        tiles = (tile for _, rows in encoder.chunks() for tile in encoder.tiles(rows))
        chosen = [top_k(tile, bias, k) for _, tile, bias in tiles]
    else:
        chosen = [best_latents(encoder, rows, k)[0] for _, rows in encoder.chunks()]
    return fixed_size_entries(torch.cat(chosen), encoder.d_sae)


def best_latents(encoder: Encoder, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k latents with the largest pre-activations on each of some rows, and these, (rows, k); all if they are fewer.

    The pre-activations are in the precision of the encoder's product.
    """
    latents, values = [rows.new_empty(len(rows), 0, dtype=torch.int64)], [encoder.bias.new_empty(len(rows), 0)]
    for first_latent, tile, bias in encoder.tiles(rows):
        places = top_k(tile, bias, k)
        latents.append(places + first_latent)
        values.append(tile.gather(1, places) + bias[places])
    if len(values) <= 2:
        return latents[-1], values[-1]
    together = torch.cat(values, dim=1)  # the k best of the row are among the k best of each tile
    places = top_k(together, together.new_zeros(together.shape[1]), k)
    return torch.cat(latents, dim=1).gather(1, places), together.gather(1, places)


def entries_where(chosen: Tensor, latents: Tensor, d_sae: int) -> Entries:
    """The entries of `latents` (rows, n) that are `chosen` (rows, n)."""
    counts = chosen.sum(dim=1)
    return Entries(latents[chosen], torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)]), d_sae)


def top_k(tile: Tensor, bias: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row of `tile` (rows, n) + `bias` (n,), in no order; all of them if n <= k."""
    k = min(k, tile.shape[1])
    return cpu.top_k(tile, bias, k) if cpu.supports(tile) else top_k_by_groups(tile + bias, k)


def highest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places and values of the k largest of each row of `x` (rows, n), largest first, of equal ones the first place."""
    if min(k, x.shape[1]) < 1:
        return x.new_empty(len(x), 0, dtype=torch.int64), x.new_empty(len(x), 0)
    places = top_k(x, x.new_zeros(x.shape[1]), k).sort(dim=1).values
    values, order = x.gather(1, places).sort(dim=1, descending=True, stable=True)
    return places.gather(1, order), values


def top_k_by_groups(x: Tensor, k: int) -> Tensor:
    """`top_k` in plain torch, on a CPU three times faster than `topk` of whole rows.

    The k largest numbers of a row lie in the k groups with the largest maxima. So a row of 8,192 is reduced to 256
    maxima, then to the 32 best groups of 32 numbers, and these in the same way. Groups have the places j, j + n_groups,
    j + 2 n_groups, ..., so that the maxima of all groups are maxima of whole vectors.
    """
    n_rows, n = x.shape
    n_groups = n
    while n_groups % 2 == 0 and n_groups // 2 >= max(256, 4 * k):
        n_groups //= 2
    if n_groups == n or x.is_cuda:
        return x.topk(k, dim=1, sorted=False).indices
    grouped = x.view(n_rows, -1, n_groups)
    best = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, best.unsqueeze(1).expand(-1, grouped.shape[1], -1)).flatten(start_dim=1)
    places = top_k_by_groups(candidates, k)
    member, which = places // k, places % k
    return member * n_groups + best.gather(1, which)


# --------------------------------------------------------------------------------------------------- by a threshold


def above_threshold(encoder: Encoder, threshold: Tensor | float, shard: Shard = WHOLE) -> Entries | None:
    """All latents with a pre-activation above `threshold`, a number or one for each latent (d_sae,).

    None if they are so many that dense products are faster, judged by the first chunk of rows (a random sample), on all
    ranks of a `shard` alike.
    """
    parts = []
    for first_row, rows in encoder.chunks():
        parts.append(rows_above(encoder, rows, threshold).at_entries)
        if first_row == 0:
            seen = [len(parts[0].latents), len(rows) * encoder.d_sae]
            n_active, n_possible = shard.summed(torch.tensor(seen, device=rows.device)).tolist()
            if n_active > TOO_DENSE * n_possible:
                return None
    return concatenate(parts)


def rows_above(encoder: Encoder, rows: Tensor, threshold: Tensor | float) -> Code:
    """The pre-activations of some rows above the threshold, in the precision of the encoder's product."""
    limits = threshold - encoder.bias
    tiles = []
    for first_latent, tile, bias in encoder.tiles(rows):
        places, offsets = above(tile, limits[first_latent : first_latent + len(bias)])
        entries = Entries(places + first_latent, offsets, encoder.d_sae)
        products = tile.flatten().index_select(0, entries.rows * tile.shape[1] + places)
        tiles.append(Code(products + bias[places], entries))
    return tiles[0] if len(tiles) == 1 else side_by_side(tiles)


def side_by_side(codes: list[Code]) -> Code:
    """One code from codes of the same rows, each over higher latents than the one before."""
    parts = [code.at_entries for code in codes]
    order = torch.cat([part.rows for part in parts]).argsort(stable=True)
    latents = torch.cat([part.latents for part in parts])[order]
    offsets = torch.stack([part.offsets for part in parts]).sum(dim=0)
    return Code(torch.cat([code.values for code in codes])[order], Entries(latents, offsets, parts[0].d_sae))


def above(tile: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Where `tile` (rows, n) is above `limits` (n,): the places, row after row, and the rows' offsets (rows + 1,)."""
    if cpu.supports(tile):
        return cpu.above(tile, limits)
    row, place = (tile > limits).nonzero(as_tuple=True)
    return place, offsets_of(row, len(tile))


# -------------------------------------------------------------------------------------------------- k to a row, in all


def top_k_of_batch(encoder: Encoder, k: int, block: Block = ALL) -> Entries:
    """The k * rows largest positive pre-activations of the whole batch (Bussmann et al. 2024).

    A few rows give a low estimate of the smallest one to keep. All pre-activations above the estimate are collected,
    and the largest of them kept, of equal ones those of the first row and latent. If the estimate was too high, a lower
    one is tried, and in the end everything above 0 is collected. The encoder may have the rows and latents of a
    process's `block`: the largest of all processes are kept.
    """
    n_rows, peers = len(encoder.sae_in), block.peers
    wanted = k * block.n_rows(n_rows, encoder.bias.device)
    _, first = next(encoder.chunks())
    first = first[:SAMPLE_ROWS]
    sample = torch.cat([(tile + bias).flatten() for _, tile, bias in encoder.tiles(first)])
    exact = at_least_float32(sample.dtype)  # because gloo knows no bfloat16
    for excess in EXCESS:
        n = excess * k * len(first)
        low = peers.least(largest(block.sample(sample.to(exact), n), n).clamp_min(0)).to(sample.dtype)
        found = collect(encoder, low)
        if int(peers.summed(torch.tensor(len(found.values)))) >= wanted:
            break
    else:
        found = collect(encoder, torch.zeros((), dtype=sample.dtype, device=sample.device))
    entries = found.at_entries
    keys = block.keys(entries.rows * encoder.d_sae + entries.latents, encoder.d_sae)
    kept = peers.largest(found.values.to(exact), keys, wanted)
    return Entries(entries.latents[kept], offsets_of(entries.rows[kept], n_rows), encoder.d_sae)


def largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of `values`, or their smallest if there are fewer."""
    n = min(n, len(values))
    return values.kthvalue(len(values) - n + 1).values


def collect(encoder: Encoder, threshold: Tensor) -> Code:
    """The pre-activations of the batch above one threshold for all latents."""
    parts = [rows_above(encoder, rows, threshold) for _, rows in encoder.chunks()]
    return Code(torch.cat([part.values for part in parts]), concatenate([part.at_entries for part in parts]))
