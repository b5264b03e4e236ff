"""How several processes share a build: which of them makes which pass, and how they act together.

Passes are dealt out to lanes, and lanes to processes. What depends on the order of passes is kept for each lane, so it
is the same for any number of processes, up to as many as there are lanes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from sae_training.parallel.ranks import is_first, n_ranks, of_first, raise_together, rank

N_LANES = 24  # which 1, 2, 3, 4, 6, 8, 12 or 24 processes share evenly

T = TypeVar("T")


def n_lanes() -> int:
    return max(N_LANES, n_ranks())


def lane_of(number: int) -> int:
    """Return the lane of pass `number` of a corpus."""
    return number % n_lanes()


def is_own_lane(lane: int) -> bool:
    return lane % n_ranks() == rank()


def passes_of_turn(number: int) -> int:
    """Return how many passes, from `number` on, are made at once: one by each process."""
    return min(n_ranks(), n_lanes() - lane_of(number))


@contextlib.contextmanager
def raised_together() -> Iterator[None]:
    """Raise an error of the block on all processes, where each comes to the end of the block. It waits for all."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


def by_first(make: Callable[[], T]) -> T:
    """Return on every process what `make` returns on the first, where alone it is called; its error is everyone's."""
    made: list[T] = []
    with raised_together():
        if is_first():
            made.append(make())
    return of_first(lambda: made[0])
