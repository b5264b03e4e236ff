"""The part of a batch's code that this process computes, its rows by its latents, for a choice among all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_training.parallel.peers import Peers
from sae_training.parallel.shard import WHOLE, Shard
from sae_training.parallel.share import ALONE, Share


@dataclass(frozen=True)
class Block:
    """The rows of `share` and the latents of `shard`: in one process all."""

    share: Share = ALONE
    shard: Shard = WHOLE

    @property
    def peers(self) -> Peers:
        """The processes that compute the code together: of a mesh, all of the job."""
        if self.share.is_all or self.shard.is_all:
            return self.shard if self.share.is_all else self.share
        return Peers(self.share.rank * self.shard.n + self.shard.rank, self.share.n * self.shard.n)

    def n_rows(self, of_own: int, device: torch.device) -> int:
        """Return how many rows the code has."""
        return of_own if self.share.is_all else int(self.share.summed(torch.tensor(of_own, device=device)))

    def keys(self, places: Tensor, d_own: int) -> Tensor:
        """Return numbers that are different for all (row, latent) pairs of the code, and ascend with both.

        `places`: the pairs as places in this block of `d_own` latents, row * d_own + latent.
        """
        rows = places // d_own * self.share.n + self.share.rank
        return rows * max(d_own, self.shard.d_sae) + self.shard.first + places % d_own

    def sample(self, values: Tensor, wanted: int) -> Tensor:
        """Return of the `values` (n,) of some rows what tells which are the `wanted` largest of these rows."""
        if self.shard.is_all:
            return values
        return self.shard.gathered(values.topk(min(wanted, len(values)), sorted=False).values)


ALL = Block()
