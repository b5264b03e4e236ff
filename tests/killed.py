"""Jobs in processes of their own, killed at a disk operation of one's choice.

The kill is real (SIGKILL), but its moment is counted and not timed, so no test depends on how fast a machine is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from processes import FORKS

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate")  # audit events that begin with a path


def run_job(job: Callable[[], Any], folder: Path, kill_at: int | None = None, where: str = "") -> Counter[str]:
    """Run `job` in a process; kill it before operation number `kill_at` on the file or folder `where` in `folder`.

    `where` "" stands for all of `folder`. Return how many operations there were on each; none if it was killed.
    """
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=work, args=(job, folder, kill_at, where, sender))
    process.start()
    sender.close()
    process.join(300)
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL), (process.exitcode, kill_at, where)
    return receiver.recv() if kill_at is None else Counter()


def work(job: Callable[[], Any], folder: Path, kill_at: int | None, where: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            counts.update(("", str(arguments[0]).removeprefix(f"{folder}{os.sep}").split(os.sep)[0]))
            if kill_at is not None and counts[where] >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    job()
    sender.send(counts)
