"""What processes that do one piece of work together tell each other. One alone is told nothing, and waits for none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae_training.parallel.ranks import of_all

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """`n` processes, of which this is the `rank`-th. All of them must call the same methods in the same order."""

    rank: int = 0
    n: int = 1
    group: dist.ProcessGroup | None = field(default=None, kw_only=True)
    """Through which they exchange tensors; None: they are all processes of the job."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # because a copy of what they work on has the same group, which itself cannot be copied

    @property
    def is_all(self) -> bool:
        """Whether this process has no others beside it."""
        return self.n == 1

    def summed(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks, with the same bits on each, without gradient."""
        return self.reduced(value, dist.ReduceOp.SUM)

    def least(self, value: Tensor) -> Tensor:
        """Return the smallest of the ranks' values, element by element."""
        return self.reduced(value, dist.ReduceOp.MIN)

    def reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.is_all:
            return value
        check_there()
        is_narrow = value.dtype in (torch.bfloat16, torch.float16)  # which gloo cannot add, or no network exactly
        out = value.detach().to(torch.float32 if is_narrow else value.dtype, copy=True).contiguous()
        dist.all_reduce(out, operation, group=self.group)
        return out.to(value.dtype)

    def of_first(self, value: Tensor) -> Tensor:
        """Return the first rank's value on all of them, where equal values may differ in their last bits.

        They do if each is a sum over a group of its own, because a network may add in another order in each group.
        """
        if self.is_all:
            return value
        out = value.detach().contiguous().clone()
        dist.broadcast(out, 0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group)
        return out

    def everyones(self, value: T) -> list[T]:
        """Return a value of any kind of each rank. All processes of the job must call it, those of other groups too."""
        values = of_all(value)
        return values if self.group is None else [values[rank] for rank in dist.get_process_group_ranks(self.group)]

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows (n, ...) of all ranks, one rank's after the other's, which may have different numbers."""
        return rows if self.is_all else torch.cat(self.of_each(rows))

    def of_each(self, rows: Tensor) -> list[Tensor]:
        """Return the rows (n, ...) of each rank, which may have different numbers."""
        check_there()
        n_rows = torch.tensor([len(rows)], device=rows.device)
        sizes = [torch.empty_like(n_rows) for _ in range(self.n)]
        dist.all_gather(sizes, n_rows, group=self.group)
        counts = torch.cat(sizes).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # because gloo's messages have one size
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group=self.group)
        return [of_rank[:count] for of_rank, count in zip(found, counts, strict=True)]

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


def check_there() -> None:
    """Raise RuntimeError if the processes have left their job, which is over."""
    if not dist.is_initialized():
        raise RuntimeError(
            "parallel: found a part of an autoencoder whose other parts were held by processes of a job that is over; "
            "load the whole from the run's folder (SparseAutoencoder.load_from_pretrained)."
        )
