"""Checkpoints that are written while steps go on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from sae_training.run.background import Background


def test_a_copy_does_not_change_with_what_it_is_of() -> None:
    background = Background()
    state = {"weights": {"W": torch.zeros(2, 3)}, "passes": {"rows": [1, 2]}, "step": 4}
    copied = background.copied(state)
    state["weights"]["W"].fill_(1)
    state["passes"]["rows"].append(3)
    assert copied["weights"]["W"].tolist() == [[0.0] * 3] * 2
    assert copied["passes"] == {"rows": [1, 2]} and copied["step"] == 4


def test_memory_is_kept_for_the_next_copy_and_values_lie_as_before() -> None:
    background = Background()
    first = background.copied({"a": torch.arange(6.0).reshape(2, 3).T})["a"]
    second = background.copied({"a": torch.ones(2, 3).T})["a"]
    assert second.data_ptr() == first.data_ptr() and second.stride() == (1, 3)
    longer = background.copied({"a": torch.ones(4)})["a"]
    assert longer.shape == (4,)


def test_what_is_written_is_taken_once() -> None:
    background, may_end = Background(), threading.Event()

    def write() -> Path:
        may_end.wait()
        return Path("step_1")

    background.begin(write)
    assert not background.is_done()
    may_end.set()
    assert background.take() == Path("step_1")
    assert background.take() is None and not background.is_done()


def test_what_kept_it_from_being_written_is_raised() -> None:
    background = Background()

    def fail() -> Path:
        raise OSError("no room")

    background.begin(fail)
    with pytest.raises(OSError, match="no room"):
        background.take()
    background.begin(lambda: Path("step_2"))
    assert background.take() == Path("step_2")
