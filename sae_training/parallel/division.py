"""How processes share the work of a run: each trains autoencoders of its own, or all train the same ones together.

| cfg.parallel | each process trains            | it computes        | what an autoencoder leaves is written by |
|--------------|--------------------------------|--------------------|------------------------------------------|
| data         | every autoencoder              | its rows of a batch | the first process                       |
| latents      | a part of each autoencoder     | all rows           | all: each writes the part of its latents |
| data,latents | a part of each autoencoder     | its group's rows   | the first group, as with latents         |
| layers       | those that are dealt out to it | all rows           | the process that trains it               |

data,latents is a mesh of groups by the ranks of a group. Those of a group are neighbours, on one machine where they can
be, because they exchange most: of G groups of L ranks, rank r is number r % L of group r // L.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from sae_training.parallel.balance import shared_out
from sae_training.parallel.ranks import is_first, n_ranks, rank
from sae_training.parallel.shard import WHOLE, Shard
from sae_training.parallel.share import ALONE, Share


@dataclass(frozen=True)
class Division:
    """The part of this process."""

    names: list[list[str]]
    """The autoencoders that each rank trains."""
    share: Share = ALONE
    """The rows of each batch that this rank computes."""
    shard: Shard = WHOLE
    """The latents of each autoencoder that this rank holds."""
    is_recorder: bool = True
    """Whether this rank writes what the autoencoders leave that it trains, of latents their parts aside."""

    @property
    def own_names(self) -> list[str]:
        return self.names[rank()]


def division(
    how: str, costs: Mapping[str, float], mesh: Sequence[int] = (), patience: timedelta | None = None
) -> Division:
    """Return the part of this process in training the autoencoders `costs`, of which each has a cost by its name.

    `mesh`: see `shape`. Processes of a mesh wait for each other with `patience`. All must call it.
    """
    if how == "layers":
        return Division(shared_out(costs, n_ranks()))
    share, shard = on_mesh(*shape(how, mesh), patience)
    return Division([list(costs)] * n_ranks(), share, shard, is_first())


def shape(how: str, mesh: Sequence[int] = ()) -> tuple[int, int]:
    """Return how many groups share the rows, and how many ranks of a group the latents. ValueError for another number.

    `mesh` has both where `how` leaves them open, and is of no use to one process alone.
    """
    n = n_ranks()
    if how != "data,latents" or n == 1:
        return {"data": (n, 1), "latents": (1, n)}.get(how, (1, 1))
    groups, of_group = mesh
    if groups * of_group != n:
        fitting = " or ".join(f"{n // size},{size}" for size in range(1, n + 1) if n % size == 0)
        raise ValueError(
            f"mesh: found {groups},{of_group}, for {groups * of_group} processes, with {n}, expected {fitting}; give "
            f"one to the command that began the run, or start {groups * of_group} processes (--nproc_per_node)."
        )
    return groups, of_group


def on_mesh(groups: int, of_group: int, patience: timedelta | None = None) -> tuple[Share, Shard]:
    """Return the rows and the latents of this rank, and with whom it exchanges what. All ranks must call it."""
    group, number = divmod(rank(), of_group)
    if groups == 1 or of_group == 1:
        return Share(group, groups), Shard(number, of_group)
    ranks = [list(range(first, first + of_group)) for first in range(0, groups * of_group, of_group)]
    share = Share(group, groups, group=own_group([list(same) for same in zip(*ranks, strict=True)], patience))
    return share, Shard(number, of_group, group=own_group(ranks, patience))


def own_group(ranks: list[list[int]], patience: timedelta | None) -> dist.ProcessGroup:
    """Return that of some groups which has this rank. (Those of a DeviceMesh wait as long as torch does by default.)"""
    group, _ = dist.new_subgroups_by_enumeration(ranks, patience)
    assert isinstance(group, dist.ProcessGroup)
    return group


def check_optimizer(optimizers: Iterable[str]) -> None:
    """Raise ValueError for one whose moments are of many latents at once."""
    if "adam8bit" in optimizers:
        raise ValueError(
            "optimizer: found adam8bit where processes share latents, expected adam or signum: it counts numbers in "
            "blocks, which cannot be cut between latents."
        )


def check_rows(share: Share, smallest: int) -> None:
    """Raise ValueError if more ranks, or groups of them, share the rows than the smallest part of a batch has."""
    if share.n > smallest:
        found = f"{share.n} {'ranks' if share.n == n_ranks() else 'groups of ranks'}"
        raise ValueError(
            f"parallel: found {found} for {smallest} rows that are computed at once, expected as many at most; start "
            "fewer processes (--nproc_per_node), or raise train_batch_size or micro_batch_size."
        )
