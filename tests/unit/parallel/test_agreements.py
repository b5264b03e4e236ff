"""What processes agree on: an error of one is everybody's, and so is a stop, whoever has how much to do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist
from ranks import on_ranks

from sae_training.kernels.cpu import SOURCE
from sae_training.machine.interrupt import StopAsked, StopRequest
from sae_training.parallel.agreement import PACKAGE, SOURCES, code
from sae_training.parallel.ranks import CONTROL, Rounds, of_first, rank


def failed_on_the_first() -> tuple[str, str]:
    CONTROL.append(dist.new_group(backend="gloo"))
    try:
        of_first(lambda: int("x"))
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def test_an_error_of_the_first_is_raised_on_all() -> None:
    (kind, said), other = on_ranks(2, failed_on_the_first)
    assert kind == "ValueError"
    assert other == ("OSError", f"rank 0: {said}")


def steps_made(n_of_ranks: list[int], stopped_before: int) -> int:
    """Return how many of its steps this rank makes, if the last one is asked to stop before one of its own."""
    CONTROL.append(dist.new_group(backend="gloo"))
    made = 0
    with StopRequest(lambda message: None, by_agreement=True) as stop:
        try:
            rounds = Rounds(n_of_ranks[rank()])
            for step in range(n_of_ranks[rank()]):
                if rank() == 1 and step == stopped_before:
                    os.kill(os.getpid(), signal.SIGTERM)
                    while stop.asked is None:
                        time.sleep(0.01)
                rounds.next()
                made += 1
            rounds.finish()
        except StopAsked:
            return -made
    return made


def test_ranks_with_more_and_less_to_do_agree_before_each_step() -> None:
    assert on_ranks(2, steps_made, [3, 1], 9) == [3, 1]
    assert on_ranks(2, steps_made, [0, 2], 9) == [0, 2]
    assert on_ranks(2, steps_made, [4, 3], 2) == [-2, -2]


def test_code_differs_with_any_source_file_and_with_nothing_else(tmp_path: Path) -> None:
    assert PACKAGE in SOURCE.parents and SOURCE.suffix in SOURCES
    hashes = [code()]
    for name, text in (("a.py", "1"), ("a.py", "2"), ("below/b.cpp", "1"), ("below/c.cpp", "1"), ("a.pyc", "1")):
        (tmp_path / "below").mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        code.cache_clear()
        hashes.append(code(tmp_path))
    assert len({*hashes[:-1]}) == 5
    assert hashes[-1] == hashes[-2]
