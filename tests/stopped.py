"""Jobs in processes of their own that get a signal in a phase of one's choice.

The signal is real, but its moment is the n-th `stop_point` in the phase, so no test depends on how fast a machine is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from processes import FORKS

from sae_training import cli
from sae_training.machine.interrupt import HEEDED, stop_point
from sae_training.machine.phases import COUNTED


def run_stopped(folder: Path, phase: str, n: int, number: signal.Signals, *arguments: str) -> tuple[int, str, int]:
    """Run the command, with a signal at the n-th stop point within `phase`.

    Return the exit code, what was said, and how many stop points came after the signal: 0 if it was heeded at once.
    """
    files = [folder / f"{phase} {n}.{ending}" for ending in ("said", "after")]
    process = FORKS.Process(target=work, args=(phase, n, number, arguments, *files))
    process.start()
    process.join(300)
    assert process.exitcode is not None
    after = files[1].read_text() if files[1].exists() else ""
    return process.exitcode, files[0].read_text(encoding="utf-8"), len(after.splitlines())


def work(phase: str, n: int, number: signal.Signals, arguments: tuple[str, ...], said: Path, after: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    torch.set_num_threads(1)
    n_seen = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal n_seen
        if event != "call" or frame.f_code is not stop_point.__code__ or phase not in COUNTED[-1].open:
            return
        n_seen += 1
        if n_seen == n:
            os.kill(os.getpid(), number)
            while HEEDED and HEEDED[-1].signal is None:  # a thread notes it
                time.sleep(0.001)
        elif n_seen > n:
            with after.open("a") as file:
                file.write("one\n")

    sys.setprofile(watch)
    code = cli.main(list(arguments))
    sys.stdout.flush()
    sys.exit(code)
