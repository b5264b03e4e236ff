"""Commands of the package in processes of their own, for tests that stop and kill them.

They are forked from one server that has imported the package: the import takes up to ten times as long as a small run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sae_training import cli

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["processes", "sae_training.lm_runner"])


Main = Callable[[Sequence[str]], int]


class Command:
    """`python -m sae_training` with the arguments, in a process; what it says goes to files. It has Popen's face.

    `main` is another program's, in place of `sae_training.cli`.
    """

    def __init__(
        self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, main: Main = cli.main
    ) -> None:
        self.files = [folder / f"{uuid.uuid4().hex}.{ending}" for ending in ("out", "err")]
        self.process = FORKS.Process(target=run_command, args=(main, arguments, environment or {}, *self.files))
        self.process.start()
        atexit.register(self.process.kill)  # multiprocessing would wait for one that a failed test has left
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal that ended the process; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, and return what was said on stdout and stderr."""
        self.process.join(timeout)
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self.files)
        if self.returncode is None:
            self.process.kill()
            raise AssertionError(f"no end after {timeout} s: {err}")
        return out, err


def run_command(main: Main, arguments: tuple[str, ...], environment: Mapping[str, str], *files: Path) -> None:
    os.environ.update(environment)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    code = main(list(arguments))
    sys.stdout.flush()
    sys.exit(code)
