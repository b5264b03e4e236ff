"""Processes that share a buffer serve the rows that one process serves, each its part, and keep their share of them."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from sae_training.activations_store.dealt_buffer import DealtBuffer
from sae_training.activations_store.passes import Passes
from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.parallel.deal import Deal
from sae_training.parallel.peers import Peers
from sae_training.parallel.ranks import CONTROL

N_ROWS, BATCH, PART, N_BATCHES = 256, 50, 17, 12  # numbers that no number of ranks divides
WIDTHS = {"numbers": 1, "pairs": 2}


class Numbered:
    """Passes whose rows hold numbers, 0, 1, 2, ... in the order of the text; every third pass has no rows."""

    widths, dtype, device = WIDTHS, torch.float64, torch.device("cpu")

    def __init__(self) -> None:
        self.number = 0

    def next_rows(self) -> dict[str, torch.Tensor]:
        first, n = 30 * self.number, 0 if self.number % 3 == 2 else 30
        self.skip()
        numbers = torch.arange(first, first + n, dtype=torch.float64).unsqueeze(1)
        return {"numbers": numbers, "pairs": torch.cat([numbers, -numbers], dim=1)}

    def skip(self) -> None:
        self.number += 1

    def check_finite(self) -> None: ...

    def check_size(self) -> None: ...

    def check_loaded(self, rows: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def here(n_groups: int) -> Deal:
    """The part of this process, of several in so many groups."""
    n, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    of_group = n // n_groups
    return Deal(Peers(rank // of_group, n_groups), Peers(rank % of_group, of_group), BATCH, PART)


def opened(deal: Deal) -> ShuffleBuffer:
    passes = cast("Passes", Numbered())
    return ShuffleBuffer(passes, N_ROWS) if deal.n == 1 else DealtBuffer(passes, N_ROWS, deal)


def served(buffer: ShuffleBuffer, n: int) -> list[torch.Tensor]:
    batches = []
    for _ in range(n):
        rows = buffer.take(BATCH)
        assert torch.equal(rows("pairs")[:, :1], rows("numbers"))
        batches.append(rows("numbers").flatten())
    return batches


def run_of(n_groups: int, states: list[dict[str, Any]] | None, n_first: int) -> dict[str, Any]:
    """What a process serves, from the start or from what some processes have saved, and its state after some of it."""
    CONTROL[:] = [dist.group.WORLD if dist.is_initialized() else None]
    deal = here(n_groups)
    buffer = opened(deal)
    if states:
        buffer.load_state_dict(states[0])
        for part in states[1:]:
            buffer.load_rows(part)
    first = served(buffer, n_first)
    state = copy.deepcopy(buffer.state_dict())
    rest, sample = served(buffer, N_BATCHES - n_first if not states else 3), buffer.sample(100)("pairs")
    kept = {len(rows) for rows in buffer.buffers.values()}
    return {"batches": first + rest, "state": state, "deal": deal, "sample": sample, "kept": kept}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_of(1, None, 4)


WAYS = [(2, 2), (2, 1), (3, 3), (4, 2)]


@pytest.mark.parametrize(("n", "n_groups"), WAYS, ids=["data", "latents", "data of three", "mesh"])
def test_each_process_serves_its_part_of_the_same_batches(n: int, n_groups: int, alone: dict[str, Any]) -> None:
    found = on_ranks(n, run_of, n_groups, None, 4)
    for of_rank in found:
        deal = of_rank["deal"]
        for own, rows in zip(of_rank["batches"], alone["batches"], strict=True):
            expected = torch.cat([part[deal.groups.rank :: n_groups] for part in rows.split(PART)])
            assert torch.equal(own, expected)
        assert torch.equal(of_rank["sample"], alone["sample"])
    kept = [of_rank["kept"].pop() for of_rank in found]
    assert (
        sum(kept) == N_ROWS and max(kept) <= N_ROWS / n + N_ROWS / BATCH * 3
    )  # 3 parts of a batch, a row too many each


@pytest.mark.parametrize("n_first", [0, 1, 3, 6, 7])
def test_any_number_of_processes_goes_on_where_others_stopped(n_first: int, alone: dict[str, Any]) -> None:
    saved = {n: [of["state"] for of in on_ranks(n, run_of, n, None, n_first)] for n in (2, 3)}
    saved[1] = [run_of(1, None, n_first)["state"]]
    for before, after, n_groups in ((1, 2, 2), (2, 1, 1), (2, 3, 3), (3, 2, 1)):
        arguments = (n_groups, saved[before], 0)
        for of_rank in [run_of(*arguments)] if after == 1 else on_ranks(after, run_of, *arguments):
            deal = of_rank["deal"]
            for own, rows in zip(of_rank["batches"], alone["batches"][n_first:], strict=False):
                assert torch.equal(own, deal.own_of_batch(rows)), (before, after)


def fails_once(n_groups: int, fails_at: int) -> list[torch.Tensor]:
    """What a process serves that meets one pass that fails, on one rank."""
    CONTROL[:] = [dist.group.WORLD]
    buffer = opened(here(n_groups))
    passes = cast("Any", buffer.passes)
    next_rows, left = passes.next_rows, [fails_at]

    def failing() -> Any:
        left[0] -= 1
        if left[0] == 0 and dist.get_rank() == 1:
            raise OSError("the cable is out")
        return next_rows()

    passes.next_rows = failing
    batches: list[torch.Tensor] = []
    while len(batches) < N_BATCHES:
        try:
            batches += served(buffer, 1)
        except OSError as error:
            assert "the cable is out" in str(error)
            other = opened(here(n_groups))  # and what would be saved now is good
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, buffer.state_dict())
            other.load_state_dict(states[0])
            for part in states[1:]:
                other.load_rows(part)
            buffer = other
    return batches


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_a_pass_that_fails_on_one_rank_loses_no_row(fails_at: int, alone: dict[str, Any]) -> None:
    for rank, batches in enumerate(on_ranks(2, fails_once, 2, fails_at)):
        deal = Deal(Peers(rank, 2), Peers(), BATCH, PART)
        for own, rows in zip(batches, alone["batches"], strict=True):
            assert torch.equal(own, deal.own_of_batch(rows))
