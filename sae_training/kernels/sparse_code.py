"""Sparse latent codes: which latents are active on which rows, and the products at these entries.

A dense autoencoder step is six products of 2 * rows * d_in * d_sae operations. Only the encoder's forward product needs
every latent. With n active entries each of the other five costs 2 * n * d_in:

    pre-activations   values[e] = x[row e] . W_enc[:, latent e] + b_enc[latent e]
    decode            out[row]  = sum of values[e] * W_dec[latent e] over the row's entries
    dL/dvalues[e]               = dL/dout[row e] . W_dec[latent e]
    dL/dW_dec[latent]           = sum of values[e] * dL/dout[row e] over the latent's entries
    dL/dW_enc[:, latent]        = sum of dL/dvalues[e] * x[row e] over the latent's entries

Both weight gradients read the entries latent by latent, after one sort for both. The gradient of b_dec through the
encoder's input is a matrix-vector product, because every row's input holds the same -b_dec.

`row_products` and `bags` choose their kernels by device: those of torch or `cpu` on the CPU, of `triton_products` on
CUDA. Nothing here waits for the device to read a number off it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sae_training.kernels import cpu, triton_products
from sae_training.machine.precision import at_least_float32
from sae_training.parallel.shard import Shard
from sae_training.parallel.share import Share


class ByLatent(NamedTuple):
    """The entries in the order of their latents."""

    order: Tensor
    """(n,) int64: the number of the entry at each position."""
    latents: Tensor
    rows: Tensor
    offsets: Tensor
    """(d_sae + 1,) int64: latent i has the entries offsets[i] to offsets[i + 1]."""


@dataclass(frozen=True)
class Entries:
    """The n active (row, latent) pairs of a batch, row after row. Their values are separate tensors (n,)."""

    latents: Tensor
    """(n,) int64: the latent of each entry."""
    offsets: Tensor
    """(n_rows + 1,) int64: row i has the entries offsets[i] to offsets[i + 1]."""
    d_sae: int

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """(n,) int64: the row of each entry."""
        if self.offsets.device.type != "cpu":  # repeat_interleave may wait for a device, to check the counts
            return keys_of(self.offsets, len(self.latents))
        positions = torch.arange(self.n_rows)
        return positions.repeat_interleave(self.offsets.diff(), output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> ByLatent:
        if self.latents.device.type == "cpu" and cpu.available():
            order, offsets = cpu.sort_by_latent(self.latents, self.d_sae)
            return ByLatent(order, self.latents[order], self.rows[order], offsets)
        latents, order = self.latents.sort(stable=True)
        return ByLatent(order, latents, self.rows[order], offsets_of(latents, self.d_sae))

    def counts(self, values: Tensor) -> Tensor:
        """(d_sae,) int64: on how many rows each latent's value is above 0."""
        return self.sum_by_latent((values > 0).to(torch.int64))

    def dense(self, values: Tensor) -> Tensor:
        """The codes as (n_rows, d_sae)."""
        flat = torch.zeros(self.n_rows * self.d_sae, dtype=values.dtype, device=values.device)
        return flat.index_add(0, self.rows * self.d_sae + self.latents, values).view(self.n_rows, self.d_sae)

    def sum_by_latent(self, values: Tensor) -> Tensor:
        """(d_sae,): the sum of each latent's values."""
        if triton_products.supports(values):  # because index_add_ on CUDA adds in another order each time
            return sum_of_rows(values, values.new_ones(self.n_rows, 1), self).squeeze(1)
        return torch.zeros(self.d_sae, dtype=values.dtype, device=values.device).index_add_(0, self.latents, values)


def offsets_of(keys: Tensor, n: int) -> Tensor:
    """(n + 1,) int64: key i has the positions out[i] to out[i + 1] of the ascending `keys`."""
    return torch.searchsorted(keys, torch.arange(n + 1, device=keys.device))


def keys_of(offsets: Tensor, n: int) -> Tensor:
    """(n,) int64: the ascending keys that have these `offsets`."""
    return torch.searchsorted(offsets, torch.arange(n, device=offsets.device), right=True) - 1


def concatenate(parts: list[Entries]) -> Entries:
    """The entries of all parts, the rows of one part after those of the part before."""
    if len(parts) == 1:
        return parts[0]
    ends = torch.cat([part.offsets[-1:] for part in parts]).cumsum(0)
    offsets = [parts[0].offsets] + [part.offsets[1:] + end for part, end in zip(parts[1:], ends, strict=False)]
    return Entries(torch.cat([part.latents for part in parts]), torch.cat(offsets), parts[0].d_sae)


def fixed_size_entries(latents: Tensor, d_sae: int) -> Entries:
    """Entries from `latents` (rows, k), k on each row."""
    n_rows, k = latents.shape
    offsets = torch.arange(0, n_rows * k + 1, k, device=latents.device)
    return Entries(latents.flatten(), offsets, d_sae)


# ---------------------------------------------------------------------------------------------------------- products


def row_products(rows: Tensor, table: Tensor, entries: Entries) -> Tensor:
    """(n,): rows[row e] . table[latent e] for each entry, `rows` (n_rows, d), `table` (d_sae, d)."""
    if triton_products.supports(rows):
        return triton_products.row_products(rows, table, entries.latents, entries.rows)
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        if cpu.available():
            return cpu.row_products(rows, table, entries.offsets, entries.latents)
        hear_the_warning_of_sparse_csr()
        size = (entries.n_rows, entries.d_sae)
        zeros = torch.zeros(len(entries.latents), dtype=rows.dtype)
        where = torch.sparse_csr_tensor(entries.offsets, entries.latents, zeros, size, check_invariants=False)
        return torch.sparse.sampled_addmm(where, rows, table.T, beta=0.0).values()
    # Gathered in pieces of at most 64 MB (float32), so that (n, d) is never held at once.
    n = max(1, 2**24 // rows.shape[1])
    pieces = zip(entries.rows.split(n), entries.latents.split(n), strict=True)
    return torch.cat([torch.linalg.vecdot(rows[r], table[latent]) for r, latent in pieces])


@cache
def hear_the_warning_of_sparse_csr() -> None:
    """Use up torch's warning that sparse CSR tensors are in beta, given once a process, so that no user sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], (0, 1))


def sum_of_latents(values: Tensor, table: Tensor, entries: Entries) -> Tensor:
    """(n_rows, d): for each row, the sum of values[e] * table[latent e]."""
    return bags(entries.latents, entries.offsets, values, table)


def sum_of_rows(values: Tensor, rows: Tensor, entries: Entries) -> Tensor:
    """(d_sae, d): for each latent, the sum of values[e] * rows[row e]."""
    order, latents, row_of, offsets = entries.by_latent
    return bags(row_of, offsets, values[order], rows, bag_of=latents)


def bags(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor, bag_of: Tensor | None = None) -> Tensor:
    """Weighted sums of rows of `table`, one for each bag, which is a stretch of `indices` between two `offsets`.

    `bag_of` (n,), the bag of each index, is needed where some bags are very long.
    """
    if triton_products.supports(table):
        return triton_products.bags(indices, offsets, weights, table, bag_of)
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


class PreActivations(Function):
    """`pre_activations_at`, with gradients to b_dec, W_enc and b_enc."""

    @staticmethod
    def forward(ctx: Any, sae_in: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor, entries: Entries) -> Any:
        ctx.save_for_backward(sae_in, W_enc)
        ctx.entries = entries
        return row_products(sae_in, W_enc.T, entries).add_(b_enc[entries.latents])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        sae_in, W_enc = ctx.saved_tensors
        b_enc_gradient = ctx.entries.sum_by_latent(gradient)
        b_dec_gradient = -(W_enc @ b_enc_gradient) if ctx.needs_input_grad[1] else None
        return None, b_dec_gradient, sum_of_rows(gradient, sae_in, ctx.entries).T, b_enc_gradient, None


def pre_activations_at(entries: Entries, sae_in: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """(n,) pre-activations at the entries of `sae_in` (n_rows, d_in), which is x - b_dec, or x if `b_dec` is None."""
    return PreActivations.apply(sae_in, b_dec, W_enc, b_enc, entries)  # pyright: ignore[reportReturnType]


class Decode(Function):
    """(n_rows, d_in): for each row, the sum of values[e] * W_dec[latent e]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, entries: Entries) -> Any:
        ctx.save_for_backward(values, W_dec)
        ctx.entries = entries
        return sum_of_latents(values, W_dec, entries)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        values, W_dec = ctx.saved_tensors
        gradient = gradient.contiguous()
        W_dec_gradient = sum_of_rows(values, gradient, ctx.entries) if ctx.needs_input_grad[1] else None
        return row_products(gradient, W_dec, ctx.entries), W_dec_gradient, None


# ---------------------------------------------------------------------------------------------------- codes of a batch


@dataclass(frozen=True)
class Code:
    """Latent activations (or pre-activations) of a batch: `values` (rows, d_sae), or (n,) at `entries`."""

    values: Tensor
    entries: Entries | None = None

    @property
    def n_rows(self) -> int:
        return len(self.values) if self.entries is None else self.entries.n_rows

    @property
    def at_entries(self) -> Entries:
        """The entries, for code that works only with sparse codes."""
        assert self.entries is not None
        return self.entries

    def at(self, parameter: Tensor) -> Tensor:
        """The values of a parameter (d_sae,) in a shape that fits `values`."""
        return parameter if self.entries is None else parameter.index_select(0, self.entries.latents)

    def with_values(self, values: Tensor) -> Code:
        return Code(values, self.entries)

    def detach(self) -> Code:
        return Code(self.values.detach(), self.entries)

    def decode(self, W_dec: Tensor) -> Tensor:
        """(rows, d_in): the codes times W_dec (d_sae, d_in)."""
        if self.entries is None:
            return self.values @ W_dec
        return Decode.apply(self.values, W_dec, self.entries)  # pyright: ignore[reportReturnType]

    def l1(self) -> Tensor:
        """Mean over rows of the sum of |activations|, a scalar."""
        return self.values.abs().sum(dtype=at_least_float32(self.values.dtype)) / self.n_rows

    def l0(self) -> Tensor:
        """Mean number of active latents per row, a scalar."""
        return (self.values > 0).sum().float() / self.n_rows

    def counts(self) -> Tensor:
        """(d_sae,) int64: on how many rows each latent is active."""
        return (self.values > 0).sum(dim=0) if self.entries is None else self.entries.counts(self.values)

    def smallest_active(self) -> Tensor:
        """The smallest activation above 0, a scalar; infinite if there is none."""
        positive = torch.where(self.values > 0, self.values, torch.inf).flatten()
        return torch.cat([positive, positive.new_full((1,), torch.inf)]).amin()

    def dense(self) -> Tensor:
        """(rows, d_sae)."""
        return self.values if self.entries is None else self.entries.dense(self.values)


class CodeFigures:
    """Statistics of a batch's code, accumulated over micro-batches whose codes are not kept."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.sums: list[Tensor] = []
        self.smallest: list[Tensor] = []

    def add(self, code: Code) -> None:
        sums = [code.l1() * code.n_rows, code.l0() * code.n_rows, code.counts()]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.smallest.append(code.smallest_active())
        self.n_rows += code.n_rows

    def of_all(self, share: Share) -> CodeFigures:
        """Return the figures of all rows, of which these are of a process's share."""
        if share.is_all:
            return self
        everyones = CodeFigures()
        everyones.n_rows = int(share.summed(torch.tensor(self.n_rows, device=self.sums[0].device)))
        everyones.sums = [share.summed(value) for value in self.sums]
        everyones.smallest = [share.least(value) for value in self.smallest]
        return everyones

    def of_all_latents(self, shard: Shard) -> CodeFigures:
        """Return the figures of all latents, but `counts` of those of the shard, to which these belong."""
        if shard.is_all:
            return self
        everyones = CodeFigures()
        everyones.n_rows = self.n_rows
        n_active = shard.summed(self.sums[2].sum())  # a whole number, so that l0 has the bits of one process
        everyones.sums = [shard.summed(self.sums[0]), n_active.float(), self.sums[2]]
        everyones.smallest = [shard.least(value) for value in self.smallest]
        return everyones

    def l1(self) -> Tensor:
        return self.sums[0] / self.n_rows

    def l0(self) -> Tensor:
        return self.sums[1] / self.n_rows

    def counts(self) -> Tensor:
        return self.sums[2]

    def smallest_active(self) -> Tensor:
        """The mean over parts of their smallest, because latents were chosen in each part separately."""
        return torch.stack(self.smallest).mean()
