"""How the threads of OpenMP wait for each other: they spin while this process has the machine to itself, else sleep.

OpenMP's threads spin for milliseconds before they sleep. A process that is alone is faster for it; two on one machine
take each other's time (docs/reliability.md has the figures). The number of turns is read once, when torch is imported,
but GNU's library turns 100 times only while a process has more threads in its teams than there are processors. So while
other processes compute, threads here keep teams that do nothing, and all others sleep at once. Results are the same.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import threading
import time
from pathlib import Path

OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user sets to choose how threads wait; then nothing is done here."""

LOOK_EVERY = 0.5  # seconds
QUIET_FOR = 4  # looks without others before threads spin again
MOST_TEAMS = 8  # more are needed where a process has few threads on a large machine, on which there is room for all
SPARE_THREADS = 8  # that the system must have room for beside those of idle teams
PER_THREAD = 2**15  # elements, from which on torch gives one operation to several threads

watched = threading.Event()


def spin_only_while_alone() -> None:
    """Begin, once in this process, to look whether others compute, in a thread that lives as long as the process."""
    if sys.platform != "linux" or watched.is_set() or any(name in os.environ for name in OWN_SETTINGS):
        return
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(ended,), name="spins only while alone", daemon=True)
    try:
        watcher.start()
    except RuntimeError:  # the system has no room for a thread; a command goes on without this one
        return
    watched.set()
    atexit.register(lambda: (ended.set(), watcher.join(1.0)))  # torch must not be called while Python ends


def watch(ended: threading.Event) -> None:
    teams: IdleTeams | None = None
    quiet = 0
    processors = os.sched_getaffinity(0)
    with contextlib.suppress(OSError, ValueError):  # of a container that shows no counts
        before = seconds_of(processors)
        while not ended.wait(LOOK_EVERY):
            now = seconds_of(processors)
            all_, own, passed = (new - old for new, old in zip(now, before, strict=True))
            before = now
            others = (all_ - own) / passed
            n_threads = threads_of_torch() if others > noticed(len(processors)) else 1
            quiet = 0 if disturbs(others, n_threads, len(processors)) else quiet + 1
            is_other = teams is not None and quiet == 0 and teams.n_threads != n_threads
            if teams is not None and (quiet >= QUIET_FOR or is_other):
                teams.end()
                teams = None
            if teams is None and quiet == 0:
                teams = IdleTeams(n_threads, len(processors))
    if teams is not None:
        teams.end()


def noticed(n_processors: int) -> float:
    """Return how many processors others may keep at work without being noticed: counts are 10 ms off on each."""
    return 0.2 + 0.05 * n_processors


def disturbs(others: float, n_threads: int, n_processors: int) -> bool:
    """Return whether threads that spin take time of other processes, which keep `others` processors at work."""
    return n_threads > 1 and others > max(0, n_processors - n_threads) + noticed(n_processors)


def n_teams(n_threads: int, n_processors: int) -> int:
    """Return how many more teams of `n_threads` it takes until there are more threads than processors.

    Each adds all but the thread that begins it, as GNU's library counts; the first team, which computes, counts whole.
    """
    return max(0, math.ceil((n_processors - n_threads + 1) / (n_threads - 1)))


class IdleTeams:
    """Teams of threads that sleep, begun by a thread each, until `end()`; none where too many were needed."""

    def __init__(self, n_threads: int, n_processors: int) -> None:
        self.n_threads = n_threads
        self.ended = threading.Event()
        wanted = n_teams(n_threads, n_processors)
        has_room = wanted <= MOST_TEAMS and can_begin(wanted * n_threads + SPARE_THREADS)
        self.threads = [
            threading.Thread(target=self.keep, name="keeps an idle team", daemon=True)
            for _ in range(wanted if has_room else 0)
        ]
        for thread in self.threads:
            thread.start()

    def keep(self) -> None:
        torch = sys.modules["torch"]
        torch.zeros(self.n_threads * PER_THREAD, dtype=torch.uint8, device="cpu").add_(1)  # begins this thread's team
        self.ended.wait()

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def can_begin(n: int) -> bool:
    """Return whether the system has room for `n` more threads. OpenMP ends the process if it cannot begin one."""
    ended, begun = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(n):
            thread = threading.Thread(target=ended.wait, daemon=True)
            thread.start()
            begun.append(thread)
    except RuntimeError:
        return False
    finally:
        ended.set()
        for thread in begun:
            thread.join()
    return True


def threads_of_torch() -> int:
    """Return with how many threads torch computes; 1 before it is imported, which is not for a thread beside to do.

    A thread that has asked once gets the same answer for ever, so a new one asks.
    """
    torch, answers = sys.modules.get("torch"), list[int]()
    if torch is None or getattr(torch.__spec__, "_initializing", True):
        return 1
    with contextlib.suppress(RuntimeError):
        thread = threading.Thread(target=lambda: answers.append(torch.get_num_threads()), daemon=True)
        thread.start()
        thread.join()
    return answers[0] if answers else 1


def seconds_of(processors: set[int]) -> tuple[float, float, float]:
    """Return how long these processors have worked, how long this process has, and the time."""
    mine = {f"cpu{number}" for number in processors}
    lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
    # user, nice, system, idle, iowait, irq, softirq
    counts = [[int(count) for count in words[1:8]] for words in lines if words[0] in mine]
    worked = sum(sum(count) - count[3] - count[4] for count in counts) / os.sysconf("SC_CLK_TCK")
    return worked, time.process_time(), time.monotonic()
