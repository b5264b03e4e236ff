"""How processes share the work of a run: each trains autoencoders of its own, or all train the same ones together.

| cfg.parallel | each process trains            | it computes        | what an autoencoder leaves is written by |
|--------------|--------------------------------|--------------------|------------------------------------------|
| data         | every autoencoder              | its rows of a batch | the first process                       |
| latents      | a part of each autoencoder     | all rows           | all: each writes the part of its latents |
| layers       | those that are dealt out to it | all rows           | the process that trains it               |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


def division(how: str, costs: Mapping[str, float]) -> Division:
    """Return the part of this process in training the autoencoders `costs`, of which each has a cost by its name."""
    if how == "layers":
        return Division(shared_out(costs, n_ranks()))
    everything = [list(costs)] * n_ranks()
    if how == "latents":
        return Division(everything, shard=Shard(rank(), n_ranks()), is_recorder=is_first())
    return Division(everything, Share(rank(), n_ranks()), is_recorder=is_first())


def check_optimizer(optimizers: Iterable[str]) -> None:
    """Raise ValueError for one whose moments are of many latents at once."""
    if "adam8bit" in optimizers:
        raise ValueError(
            "optimizer: found adam8bit with parallel latents, expected adam or signum: it counts numbers in blocks, "
            "which cannot be cut between latents."
        )


def check_rows(smallest: int) -> None:
    """Raise ValueError if there are more ranks than rows in the smallest of the parts of a batch."""
    if n_ranks() > smallest:
        raise ValueError(
            f"parallel: found {n_ranks()} ranks for {smallest} rows that are computed at once, expected as many at "
            "most; start fewer processes (--nproc_per_node), or raise train_batch_size or micro_batch_size."
        )
