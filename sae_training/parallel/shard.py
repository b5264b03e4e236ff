"""The latents that this process holds, where several processes hold one dictionary together.

A rank has the weights of neighbouring latents, with their moments and counters: about d_sae / n of them. b_dec and
W_skip belong to no latent; every rank holds them, with the same bits. All ranks compute all rows. Each adds what its
latents contribute to a reconstruction, and what depends on all latents (a choice, a norm, a count) is agreed upon. One
process alone holds all latents, and everything here is the identity.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from sae_training.machine.precision import at_least_float32
from sae_training.parallel.peers import Peers

BY_LATENT = ("W_enc", "b_enc", "W_dec", "log_threshold", "r_mag", "b_mag")  # the parameters of which a rank has a part


@dataclass(frozen=True)
class Shard(Peers):
    """The `rank`-th of `n` stretches of latents, as equal as can be."""

    d_sae: int = 0
    """The number of all latents."""

    def over(self, d_sae: int) -> Shard:
        """Return the same rank's latents of a dictionary of `d_sae`. ValueError if a rank would not have two."""
        if self.n > 1 and d_sae < 2 * self.n:  # because a matrix with a single latent lies in memory both ways
            raise ValueError(
                f"parallel: found {self.n} ranks for {d_sae} latents, expected half as many at most; start fewer "
                "processes (--nproc_per_node), or raise expansion_factor."
            )
        return dataclasses.replace(self, d_sae=d_sae)

    @property
    def first(self) -> int:
        """The number of the first latent that is held here."""
        return self.rank * self.d_sae // self.n

    @property
    def end(self) -> int:
        """The number after that of the last one."""
        return (self.rank + 1) * self.d_sae // self.n

    @property
    def size(self) -> int:
        return self.end - self.first

    @property
    def own(self) -> slice:
        return slice(self.first, self.end)

    def below(self, latent: int) -> int:
        """Return how many of the latents before number `latent` are held here."""
        return min(max(latent - self.first, 0), self.size)

    def holds(self, latents: Tensor) -> Tensor:
        """Return which of the numbers `latents` (n,) are of latents that are held here."""
        return (latents >= self.first) & (latents < self.end)

    def own_numbers(self, latents: Tensor) -> Tensor:
        """Return those of the numbers `latents` (n,) that are held here, as numbers of the latents here."""
        return latents[self.holds(latents)] - self.first

    # ------------------------------------------------------------------------------------------------ with gradients

    def added(self, value: Tensor) -> Tensor:
        """Return the sum of the ranks' values. Its gradient, which every rank computes in full, reaches its own one."""
        return value if self.is_all else Added.apply(value, self)  # pyright: ignore[reportReturnType]

    def lent(self, parameter: Tensor) -> Tensor:
        """Return a parameter of all latents for the use of those here; its gradients from all ranks are added up."""
        return parameter if self.is_all else Lent.apply(parameter, self)  # pyright: ignore[reportReturnType]

    # ----------------------------------------------------------------------------------------------------- agreement

    def any(self, flag: Tensor) -> Tensor:
        """Return where `flag` (bool) is true on any rank."""
        return flag if self.is_all else self.summed(flag.to(torch.int32)) > 0

    def greatest(self, value: Tensor) -> Tensor:
        """Return the largest of the ranks' values, element by element."""
        return self.reduced(value, dist.ReduceOp.MAX)

    def among_largest(self, values: Tensor, k: int) -> Tensor:
        """Return which of `values` (rows, candidates) are among the k largest of their row on all ranks.

        Of equal ones the lowest latents count: each rank gives its candidates in the order of their latents. Of each
        row it gives its own k largest, or all.
        """
        wide = values.detach().to(at_least_float32(values.dtype))  # because gloo knows no bfloat16
        wide = wide.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN is the largest, as in topk
        of_each = [part.T for part in self.of_each(wide.T.contiguous())] if self.n > 1 else [wide]
        everyones = torch.cat(of_each, dim=1)
        if everyones.shape[1] <= k:
            return torch.ones_like(values, dtype=torch.bool)
        limit = everyones.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        above, equal = everyones > limit, everyones == limit
        n_equal = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1) <= n_equal))
        first = sum(part.shape[1] for part in of_each[: self.rank])
        return chosen[:, first : first + values.shape[1]]


class Added(Function):
    """`Shard.added`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Shard) -> Any:
        return shard.summed(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class Lent(Function):
    """`Shard.lent`."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shard: Shard) -> Any:
        ctx.shard = shard
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.shard.summed(gradients[0]), None


WHOLE = Shard()
"""Of a process that holds all latents; `over` says how many."""
