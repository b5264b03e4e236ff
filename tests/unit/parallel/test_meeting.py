"""Processes that meet: those of now, not those that the store remembers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore

from sae_training.parallel.meeting import rolls


def met(store: Any, number: int, n: int, looks: int = 10_000) -> str | list[int]:
    """The name of the roll that a process has answered to, or who is missing after so many looks."""
    last: str | list[int] = []
    for _, last in zip(range(looks), rolls(store, number, n), strict=False):
        if isinstance(last, str):
            break
        threading.Event().wait(0.001)
    return last


def test_all_answer_to_one_roll_and_to_another_the_next_time() -> None:
    store, names = HashStore(), set()
    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            (name,) = set(threads.map(lambda number: met(store, number, 4), range(4)))
        assert isinstance(name, str)
        names.add(name)
    assert len(names) == 3


def test_the_dead_are_not_waited_for_and_do_not_answer() -> None:
    store = HashStore()
    for number in range(3):  # of a job that died when two were there, and one that died when all had answered
        store.set(f"rank {number}", f"dead{number}")
    store.set("roll", "dead0 dead1 dead2")
    assert met(store, 1, 3, looks=5) == [0]  # nobody calls
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(met, store, 0, 3)
        threads.submit(lambda: threading.Event().wait(0.05)).result()  # the first calls the dead
        others = [threads.submit(met, store, number, 3) for number in (1, 2)]
        assert len({future.result() for future in (first, *others)}) == 1


def test_who_is_missing_is_named() -> None:
    store = HashStore()
    assert met(store, 0, 3, looks=3) == [1, 2]
    assert met(store, 2, 3, looks=3) == [1]
