"""Which rank gets which of several autoencoders, so that all ranks have about the same work."""

from __future__ import annotations

from collections.abc import Mapping


def shared_out(costs: Mapping[str, float], n: int) -> list[list[str]]:
    """Return the names that each of `n` ranks gets, in the order of `costs`: the most costly first, to the least busy.

    No rank then has more than 4/3 of the least possible load (Graham 1969). ValueError for more ranks than names.
    """
    if n > len(costs):
        raise ValueError(
            f"parallel: found {n} ranks for {len(costs)} autoencoders, expected as many at most; start fewer "
            "processes (--nproc_per_node), or train more layers."
        )
    load, owner = [0.0] * n, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = min(range(n), key=lambda r: load[r])
        owner[name] = least
        load[least] += costs[name]
    return [[name for name in costs if owner[name] == r] for r in range(n)]
