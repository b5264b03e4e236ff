"""Threads that wait for each other spin while the process is alone, and sleep while others compute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sae_training.machine.threads import OWN_SETTINGS, disturbs, n_teams

COMPUTES = "while True: pass"
WATCHES = """
import os, resource, sys, threading, time
from sae_training.machine.threads import spin_only_while_alone

def named(name):
    return sum(thread.name == name for thread in threading.enumerate())

seconds, room = map(int, sys.argv[1:])
spin_only_while_alone()
spin_only_while_alone()
import torch
time.sleep(1)  # in which it may look, and find the threads of before
torch.set_num_threads(2)
if room:
    resource.setrlimit(resource.RLIMIT_NPROC, (len(os.listdir("/proc/self/task")) + room,) * 2)
    os.setuid(65534)  # because root has no limit
deadline = time.monotonic() + seconds
while not named("keeps an idle team") and time.monotonic() < deadline:
    time.sleep(0.1)
print(named("spins only while alone"), named("keeps an idle team"), torch.ones(200_000).cumsum(0)[-1].item())
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP is another library")


def watching(seconds: int, room: int = 0, **own: str) -> list[str]:
    """Return what a process says that waits for an idle team, at most `seconds`, while another process computes.

    `room`: how many threads the system lets it begin.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS} | own
    with subprocess.Popen([sys.executable, "-c", COMPUTES]) as other:
        try:
            done = subprocess.run(
                [sys.executable, "-c", WATCHES, str(seconds), str(room)], env=environment, capture_output=True,
                text=True, check=True,
            )  # fmt: skip
        finally:
            other.kill()
    assert not done.stderr
    return done.stdout.split()


@on_linux
def test_while_another_process_computes_an_idle_team_is_kept() -> None:
    # OMP_NUM_THREADS: what torch has before the run gives it the threads that it began with
    assert watching(60, OMP_NUM_THREADS="1") == ["1", "1", "200000.0"]


@on_linux
@pytest.mark.skipif(sys.platform == "linux" and os.getuid() != 0, reason="only root can become another user")
def test_without_room_for_threads_the_process_goes_on_without_a_team() -> None:
    assert watching(4, room=1, OMP_NUM_THREADS="1") == ["1", "0", "200000.0"]


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "0"}])
def test_what_the_user_has_set_stays(own: dict[str, str]) -> None:
    assert watching(0, **own)[:2] == ["0", "0"]


@pytest.mark.parametrize(
    ("others", "n_threads", "n_processors", "expected"),
    [
        (0.1, 2, 2, False),  # what a desktop does besides
        (1.0, 2, 2, True),
        (1.0, 1, 2, False),  # one thread waits for none
        (3.0, 4, 8, False),  # there is room for both
        (4.7, 4, 8, True),
        (0.7, 16, 8, True),
        (2.0, 64, 64, False),  # counts of so many processors may be as wrong
        (4.0, 64, 64, True),
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
