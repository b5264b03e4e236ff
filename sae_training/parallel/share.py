"""The rows of a batch that this process computes, where several processes train the same weights on it.

Row i of a batch is computed by rank i % n. Rows are shuffled, so the ranks have the same work, and each has its part of
the first rows too, which are all that AuxK looks at. A mean over the rows of a batch is a sum over the ranks. One
process alone has all rows, and everything here is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Every n-th row of a batch, from the `rank`-th. All ranks must call the same methods in the same order."""

    rank: int = 0
    n: int = 1

    @property
    def is_all(self) -> bool:
        return self.n == 1

    def of(self, rows: Tensor) -> Tensor:
        """Return this process's rows of `rows` (n_rows, ...)."""
        return rows if self.is_all else rows[self.rank :: self.n].contiguous()

    def count(self, n_rows: int) -> int:
        """Return how many of the first `n_rows` rows are this process's."""
        return len(range(self.rank, n_rows, self.n))

    def weight(self, n_rows: int) -> float:
        """Return which part of `n_rows` rows is this process's: the weight of its mean in the mean of all rows."""
        return self.count(n_rows) / n_rows

    def summed(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks, with the same bits on each, without gradient."""
        return self.reduced(value, dist.ReduceOp.SUM)

    def least(self, value: Tensor) -> Tensor:
        """Return the smallest of the ranks' values, element by element."""
        return self.reduced(value, dist.ReduceOp.MIN)

    def reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.is_all:
            return value
        out = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, operation)
        return out

    def mean(self, of_own: Tensor, n_rows: int) -> Tensor:
        """Return the mean over all of `n_rows` rows from the mean over this process's, without gradient."""
        return of_own if self.is_all else self.summed(of_own.detach() * self.weight(n_rows))

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows (n, ...) of all ranks, one rank's after the other's, which may have different numbers."""
        if self.is_all:
            return rows
        n_rows = torch.tensor([len(rows)], device=rows.device)
        sizes = [torch.empty_like(n_rows) for _ in range(self.n)]
        dist.all_gather(sizes, n_rows)
        counts = torch.cat(sizes).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # because gloo's messages have one size
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([of_rank[:count] for of_rank, count in zip(found, counts, strict=True)])

    def keys(self, places: Tensor, d_sae: int) -> Tensor:
        """Return numbers that are different for all (row, latent) pairs of the batch, and ascend with both.

        `places`: the pairs as places in this process's rows, row * d_sae + latent.
        """
        return (places // d_sae * self.n + self.rank) * d_sae + places % d_sae

    def largest(self, values: Tensor, keys: Tensor, wanted: int) -> Tensor:
        """Return the places of those `values` (n,) that are among the `wanted` largest of all ranks, ascending.

        Of equal values those with the lowest `keys` (n,) count, which are different for all values of all ranks.
        """
        everyones = self.gathered(values)
        if len(everyones) <= wanted:
            return torch.arange(len(values), device=values.device)
        limit = everyones.topk(wanted, sorted=False).values.amin()
        above, equal = values > limit, values == limit
        n_equal = wanted - int((everyones > limit).sum())
        last_key = self.gathered(keys[equal]).sort().values[n_equal - 1]
        return (above | (equal & (keys <= last_key))).nonzero().flatten()


ALONE = Share()
