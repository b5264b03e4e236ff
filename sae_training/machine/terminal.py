"""What a job says once its terminal is gone: it goes to a file, and the job goes on.

A terminal that closes, an SSH connection that breaks, or a reader of a pipe that ends makes each write fail. A job for
the night must not end for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from sae_training.machine.interrupt import GOES_ON, heard

GONE = (errno.EIO, errno.EPIPE, errno.EBADF, errno.ENXIO, errno.ECONNRESET)

LINE_EVERY = 30.0  # seconds between two lines of a bar that goes to the file


class Lasting:
    """A stream of this process that goes on in a file once what it wrote to is gone."""

    in_file = False
    """Whether it has come to that."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.next_of_a_bar = 0.0

    def write(self, text: str) -> int:
        if Lasting.in_file and text.startswith("\r"):
            self.write_bar(text.strip())
            return len(text)
        try:
            return self.stream.write(text)
        except OSError as error:
            go_on_in_the_file(error)
            return self.stream.write(text)

    def write_bar(self, line: str) -> None:
        """Write a bar as a line, and not each time that it is drawn again."""
        if line and time.monotonic() >= self.next_of_a_bar:
            self.next_of_a_bar = time.monotonic() + LINE_EVERY
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            go_on_in_the_file(error)
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


LOG: list[Path] = []
"""The file of the innermost job that has one."""


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Let a job outlast its terminal: SIGHUP does not end it, and stdout and stderr go on in its file.

    Signals that are ignored (nohup) stay so. The streams of a notebook or a test are none of the system's, and stay.
    """
    ours = [number for number in GOES_ON if is_main_thread() and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, heard)
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None and not isinstance(stream, Lasting) and is_of_the_system(stream):
            setattr(sys, name, cast(TextIO, Lasting(stream)))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()  # while it may still turn to the file
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Name the file for what is said without a terminal."""
    LOG.append(path)
    try:
        yield
    finally:
        LOG.pop()


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def is_of_the_system(stream: TextIO) -> bool:
    try:
        return stream.fileno() in (1, 2)
    except (OSError, ValueError, AttributeError):
        return False


def go_on_in_the_file(error: OSError) -> None:
    """Let stdout and stderr be the file of the job, or nothing where it has none yet."""
    if error.errno not in GONE:
        raise error
    try:
        file = os.open(LOG[-1] if LOG else os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        os.write(file, f"{moment}: the terminal is gone ({os.strerror(error.errno)}); output goes on here.\n".encode())
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    Lasting.in_file = True
