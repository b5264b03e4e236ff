"""How processes that train the same autoencoders deal the rows of batches out: who computes a row, and who keeps it.

Places in a batch decide, so a batch is the same rows for any number of processes, and each has as many as the others.
Of n_d groups that share rows and n_l ranks of a group that share latents, rank d * n_l + l keeps the l-th share of the
rows that group d computes: with data alone those that it computes, with latents alone every n-th of those that all do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_training.parallel.peers import Peers


@dataclass(frozen=True)
class Deal:
    """The rows of this process among those that a buffer serves, numbered in the order of serving."""

    groups: Peers
    """Those that share the rows (`Share`), of which this process is in the `rank`-th."""
    group: Peers
    """The ranks of its group, which share the latents (`Shard`)."""
    batch: int
    """The number of rows of a batch."""
    part: int
    """How many of them are computed at once."""

    @property
    def n(self) -> int:
        return self.groups.n * self.group.n

    @property
    def rank(self) -> int:
        return self.groups.rank * self.group.n + self.group.rank

    @property
    def ranks_of_group(self) -> range:
        """The ranks of this process's group, which compute the same rows."""
        first = self.groups.rank * self.group.n
        return range(first, first + self.group.n)

    def in_part(self, numbers: Tensor) -> Tensor:
        return numbers % self.batch % self.part

    def keeper(self, numbers: Tensor) -> Tensor:
        """Return the rank that keeps each of the rows `numbers` (n,)."""
        in_part = self.in_part(numbers)
        return in_part % self.groups.n * self.group.n + in_part // self.groups.n % self.group.n

    def computed(self, numbers: Tensor) -> Tensor:
        """Return those of the rows `numbers` (n,) that this process computes, in their order."""
        return numbers[self.in_part(numbers) % self.groups.n == self.groups.rank]

    def own_of_batch(self, rows: Tensor) -> Tensor:
        """Return of all rows (batch, ...) of a batch those that this process computes."""
        return rows[self.computed(torch.arange(len(rows), device=rows.device))]
