"""How the threads of OpenMP wait for each other: they spin while this process has the machine to itself, else sleep.

OpenMP's threads spin for milliseconds before they sleep. A process that is alone is faster for it; two on one machine
take each other's time (docs/reliability.md has the figures). The number of turns is read once, when torch is imported,
but GNU's library turns 100 times only while a process has more threads in its teams than there are processors. So while
other processes compute, threads here keep teams that do nothing, and all others sleep at once. Results are the same.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
from pathlib import Path

OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user sets to choose how threads wait; then nothing is done here."""

LOOK_EVERY = 0.5  # seconds
NOTICED = 0.3  # of a processor, for what others take; a count of 10 ms on 2 processors is 0.04 off
QUIET_FOR = 4  # looks without others before threads spin again
PER_THREAD = 2**15  # elements, from which on torch gives one operation to several threads

watched = threading.Event()


def spin_only_while_alone() -> None:
    """Begin, once in this process, to look whether others compute, in a thread that lives as long as the process."""
    if sys.platform != "linux" or watched.is_set() or any(name in os.environ for name in OWN_SETTINGS):
        return
    try:
        seconds_of_processors()
    except (OSError, ValueError):  # a container that shows no counts
        return
    watched.set()
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(ended,), name="spins only while alone", daemon=True)
    watcher.start()
    atexit.register(lambda: (ended.set(), watcher.join(1.0)))  # torch must not be called while Python ends


def watch(ended: threading.Event) -> None:
    teams: IdleTeams | None = None
    quiet = 0
    before = seconds_of_processors()
    while not ended.wait(LOOK_EVERY):
        now = seconds_of_processors()
        all_, own, passed = (new - old for new, old in zip(now, before, strict=True))
        before = now
        if "torch" not in sys.modules:
            continue
        quiet = 0 if disturbs((all_ - own) / passed, *threads_and_processors()) else quiet + 1
        if quiet == 0 and teams is None:
            teams = IdleTeams(*threads_and_processors())
        elif quiet >= QUIET_FOR and teams is not None:
            teams.end()
            teams = None
    if teams is not None:
        teams.end()


def disturbs(others: float, n_threads: int, n_processors: int) -> bool:
    """Return whether threads that spin take time of other processes, which keep `others` processors at work."""
    return n_threads > 1 and others > max(0, n_processors - n_threads) + NOTICED


def n_teams(n_threads: int, n_processors: int) -> int:
    """Return how many more teams of `n_threads` it takes until there are more threads than processors.

    Each adds all but the thread that begins it, as GNU's library counts; the first team, which computes, counts whole.
    """
    return max(0, math.ceil((n_processors - n_threads + 1) / (n_threads - 1)))


class IdleTeams:
    """Teams of threads that sleep, begun by a thread each, until `end()`."""

    def __init__(self, n_threads: int, n_processors: int) -> None:
        self.ended = threading.Event()
        self.threads = [
            threading.Thread(target=self.keep, args=(n_threads,), name="keeps an idle team", daemon=True)
            for _ in range(n_teams(n_threads, n_processors))
        ]
        for thread in self.threads:
            thread.start()

    def keep(self, n_threads: int) -> None:
        import torch

        torch.zeros(n_threads * PER_THREAD, dtype=torch.uint8, device="cpu").add_(1)  # which begins this thread's team
        self.ended.wait()

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def threads_and_processors() -> tuple[int, int]:
    import torch

    return torch.get_num_threads(), len(os.sched_getaffinity(0))


def seconds_of_processors() -> tuple[float, float, float]:
    """Return how long the processors that this process may use have worked, how long it has, and the time."""
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
    # user, nice, system, idle, iowait, irq, softirq
    counts = [[int(count) for count in words[1:8]] for words in lines if words[0] in mine]
    worked = sum(sum(count) - count[3] - count[4] for count in counts) / os.sysconf("SC_CLK_TCK")
    return worked, time.process_time(), time.monotonic()
