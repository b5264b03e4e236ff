"""Threads that wait for each other spin while the process is alone, and sleep while others compute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sae_training.machine.threads import OWN_SETTINGS, disturbs, n_teams

COMPUTES = "while True: pass"
WATCHES = """
import threading, time, torch
from sae_training.machine.threads import spin_only_while_alone

def teams():
    return sum(thread.name == "keeps an idle team" for thread in threading.enumerate())

torch.set_num_threads(2)
spin_only_while_alone()
spin_only_while_alone()
one = sum(thread.name == "spins only while alone" for thread in threading.enumerate())
deadline = time.monotonic() + float(input())
while not teams() and time.monotonic() < deadline:
    time.sleep(0.1)

print(one, teams() > 0, torch.ones(200_000).cumsum(0)[-1].item(), torch.get_num_threads())
"""


def watching(seconds: float, own: dict[str, str]) -> list[str]:
    """Return what a process says that waits for an idle team, at most `seconds`, while another process computes."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS} | own
    with subprocess.Popen([sys.executable, "-c", COMPUTES]) as other:
        try:
            done = subprocess.run(
                [sys.executable, "-c", WATCHES], input=str(seconds), env=environment, capture_output=True, text=True,
                check=True,
            )  # fmt: skip
        finally:
            other.kill()
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP is another library")
def test_while_another_process_computes_an_idle_team_is_kept() -> None:
    assert watching(60, {}) == ["1", "True", "200000.0", "2"]


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "0"}])
def test_what_the_user_has_set_stays(own: dict[str, str]) -> None:
    assert watching(0, own)[:2] == ["0", "False"]


@pytest.mark.parametrize(
    ("others", "n_threads", "n_processors", "expected"),
    [
        (0.1, 2, 2, False),  # what a desktop does besides
        (1.0, 2, 2, True),
        (1.0, 1, 2, False),  # one thread waits for none
        (3.0, 4, 8, False),  # there is room for both
        (4.5, 4, 8, True),
        (0.5, 16, 8, True),
    ],
)
def test_others_are_disturbed_once_there_is_no_room_for_all(
    others: float, n_threads: int, n_processors: int, expected: bool
) -> None:
    assert disturbs(others, n_threads, n_processors) is expected


@pytest.mark.parametrize(
    ("n_threads", "n_processors", "expected"),
    [(2, 2, 1), (4, 4, 1), (2, 8, 7), (4, 8, 2), (32, 64, 2), (64, 64, 1), (16, 8, 0)],
)
def test_teams_bring_more_threads_than_processors(n_threads: int, n_processors: int, expected: int) -> None:
    teams = n_teams(n_threads, n_processors)
    assert teams == expected
    assert n_threads + teams * (n_threads - 1) > n_processors
    assert teams == 0 or n_threads + (teams - 1) * (n_threads - 1) <= n_processors
