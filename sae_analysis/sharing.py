"""How several processes share a build: which of them makes which pass, and how they act together.

Passes are dealt out to lanes, and lanes to processes. What depends on the order of passes is kept for each lane, so it
is the same for any number of processes, up to as many as there are lanes.
"""

from __future__ import annotations

from sae_training.parallel.ranks import n_ranks, rank

N_LANES = 24  # which 1, 2, 3, 4, 6, 8, 12 or 24 processes share evenly


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
