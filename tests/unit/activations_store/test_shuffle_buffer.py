"""The shuffle buffer: which rows it serves, in which order, and passes that are begun ahead of need."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import SMALL_RUN

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.passes import Passes, PassesAhead
from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.language_model.load import load_language_model

HOOK = SMALL_RUN["hook_point"]
CONTEXT = 16
CHI_SQUARE_49 = 85.35  # what chi-square of 49 degrees of freedom exceeds once in a thousand


def numbered(rows_per_pass: int = 64) -> Any:
    """Passes whose rows hold one number each: 0, 1, 2, ... in the order of the text."""
    first = itertools.count(step=rows_per_pass)
    return SimpleNamespace(
        widths={"numbers": 1},
        dtype=torch.float64,
        device=torch.device("cpu"),
        next_rows=lambda: {"numbers": torch.arange(rows_per_pass, dtype=torch.float64).unsqueeze(1) + next(first)},
        check_finite=lambda: None,
        check_size=lambda: None,
    )


def served(buffer: ShuffleBuffer, n_rows: int) -> torch.Tensor:
    return buffer.take(n_rows)("numbers").flatten().long()


@pytest.mark.parametrize("rows_per_pass", [64, 60])
def test_every_row_is_served_exactly_once_over_the_refills(rows_per_pass: int) -> None:
    # Whatever was served, still waits in the buffer, or has no place yet, is each row of the text once.
    buffer = ShuffleBuffer(numbered(rows_per_pass), n_rows=256)
    seen = [served(buffer, 64) for _ in range(12)]
    waiting = buffer.buffers["numbers"].flatten()[buffer.order[buffer.served :]].long()
    seen += [waiting, buffer.spill["numbers"].flatten().long()]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(torch.cat(seen))))


@pytest.mark.parametrize("fails_at", [0, 1, 3, 4, 5, 6, 7, 9])
def test_error_of_a_pass_leaves_a_state_from_which_the_same_rows_come(fails_at: int) -> None:
    undisturbed, passes = ShuffleBuffer(numbered(60), n_rows=256), numbered(60)
    next_rows, n_calls = passes.next_rows, itertools.count()

    def failing() -> Any:
        if next(n_calls) == fails_at:
            raise ConnectionError("the cable is out")
        return next_rows()

    passes.next_rows = failing
    buffer, n_errors = ShuffleBuffer(passes, n_rows=256), 0
    for _ in range(12):
        try:
            rows = served(buffer, 64)
        except ConnectionError:
            n_errors += 1
            rows = served(buffer, 64)
        assert torch.equal(rows, served(undisturbed, 64))
    assert n_errors == 1


@pytest.mark.parametrize(("n_batches", "n_passes"), [(2, 4), (4, 4), (5, 6), (6, 6), (7, 8)])
def test_no_pass_is_made_whose_rows_nobody_would_see(n_batches: int, n_passes: int) -> None:
    # 256 rows are 4 passes and 4 batches. A fifth or sixth batch takes one refill of the 2 batches served so far, after
    # which 256 rows wait again; a seventh a second one.
    whole, ending = ShuffleBuffer(numbered(), n_rows=256), ShuffleBuffer(numbered(), n_rows=256)
    for i in range(n_batches):
        rows = ending.take(64, (n_batches - i) * 64)("numbers").flatten().long()
        if i < 2:
            assert torch.equal(rows, served(whole, 64))
    assert ending.passes.next_rows()["numbers"][0] == n_passes * 64


def test_more_than_half_of_the_buffer_at_once_is_refused() -> None:
    buffer = ShuffleBuffer(numbered(), n_rows=256)
    buffer.fill()
    with pytest.raises(ValueError, match="train_batch_size: found 129 rows a step, expected at most 128, half"):
        buffer.take(129)


def test_batches_mix_the_buffer_as_chance_would() -> None:
    """Chi-square of (eighth of the buffer in the order of the text) x (eighth of a half that is served), and the number
    of neighbours in a batch that are of one context, against what a uniformly random order gives.
    """
    n_rows, batch, n_refills = 2048, 128, 200
    buffer = ShuffleBuffer(numbered(256), n_rows)
    table = torch.zeros(8, 8)
    found = expected = 0.0
    for _ in range(n_refills):
        for i in range(n_rows // 2 // batch):
            buffer.fill(batch)
            held = buffer.buffers["numbers"].flatten()
            rank = held.argsort().argsort()  # of each place, in the order of the text
            waiting = buffer.order[buffer.served :]
            rows = served(buffer, batch)
            table[:, i] += torch.bincount(rank[waiting[:batch]] * 8 // n_rows, minlength=8)
            found += (rows[1:] // CONTEXT == rows[:-1] // CONTEXT).sum().item()
            # Of the rows not yet served, a context's c make c (c - 1) of the n (n - 1) ordered pairs.
            counts = torch.unique(held[waiting].long() // CONTEXT, return_counts=True)[1].double()
            n = len(waiting)
            expected += (batch - 1) * (counts * (counts - 1)).sum().item() / (n * (n - 1))
    mean = table.mean(dim=1, keepdim=True)  # what a cell is expected to hold, all columns having the same sum
    assert ((table - mean).pow(2) / mean).sum().item() < CHI_SQUARE_49
    assert abs(found - expected) < 3.3 * expected**0.5  # a count of rare events: its variance is its mean
    assert expected > 900


def buffer_of(store: ActivationsStore) -> ShuffleBuffer:
    assert isinstance(store.source, ShuffleBuffer)
    return store.source


def passes_of(store: ActivationsStore) -> Passes:
    passes = buffer_of(store).passes
    return passes.passes if isinstance(passes, PassesAhead) else passes


@pytest.fixture
def make_store(small_config: Callable, demo_model: Any) -> Callable[..., ActivationsStore]:
    def make(ahead: bool) -> ActivationsStore:
        store = ActivationsStore(small_config(exclude_special_tokens=True), demo_model)
        if ahead:
            buffer_of(store).passes = PassesAhead(passes_of(store))
        return store

    return make


def test_passes_that_are_made_ahead_give_the_same_batches(make_store: Callable[..., ActivationsStore]) -> None:
    plain, ahead = make_store(False), make_store(True)
    for _ in range(9):
        assert torch.equal(plain.next_batch(), ahead.next_batch())
    passes = buffer_of(ahead).passes
    assert isinstance(passes, PassesAhead)
    # One batch of 64 rows has been served since the refill: passes of 60 rows are there for it, but for the spill.
    assert len(passes.begun) == -(-(64 - len(buffer_of(ahead).spill[HOOK])) // 60) > 0


@pytest.mark.parametrize("n_before", [1, 3, 4, 8])
def test_what_was_made_ahead_is_made_again_after_a_restart(
    make_store: Callable[..., ActivationsStore], n_before: int
) -> None:
    plain, ahead, resumed = make_store(False), make_store(True), make_store(True)
    for _ in range(n_before):
        plain.next_batch(), ahead.next_batch()
    state = ahead.state_dict()
    resumed.load_state_dict(state | {"buffers": {name: rows.clone() for name, rows in state["buffers"].items()}})
    for _ in range(7):
        expected = plain.next_batch()
        assert torch.equal(resumed.next_batch(), expected)
        assert torch.equal(ahead.next_batch(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_of_their_own_changes_nothing(small_config: Callable) -> None:
    model = load_language_model("demo", "cuda", "float32")
    cfg = small_config(device="cuda", exclude_special_tokens=True)
    plain, ahead = ActivationsStore(cfg, model), ActivationsStore(cfg, model)
    buffer_of(plain).passes = passes_of(plain)
    for _ in range(20):
        assert torch.equal(plain.next_batch(), ahead.next_batch())
