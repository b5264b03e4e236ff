"""What a job says once its terminal is gone: it goes to the log in its folder, and the job goes on.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from sae_training.machine.interrupt import GOES_ON, heard
from sae_training.machine.log import FOLDERS, OUTLASTING, Log, Told
from sae_training.machine.run_files import LOG_FILE

GONE = (errno.EIO, errno.EPIPE, errno.EBADF, errno.ENXIO, errno.ECONNRESET)


class Lasting:
    """A stream of this process that goes on in the log once what it wrote to is gone; others stay as they are."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.descriptor = stream, stream.fileno()
        self.told: Told | None = None

    def is_in_the_log(self) -> bool:
        return any(self.descriptor in log.leads for log in OUTLASTING)

    def write(self, text: str) -> int:
        if not self.is_in_the_log():
            try:
                return self.stream.write(text)
            except OSError as error:
                self.go_on_in_the_log(error)
        self.told = self.told or Told(OUTLASTING[0])
        return self.told.write(text)

    def flush(self) -> None:
        if not self.is_in_the_log():
            try:
                self.stream.flush()
            except OSError as error:
                self.go_on_in_the_log(error)

    def go_on_in_the_log(self, error: OSError) -> None:
        """Let the stream be the log of the job, or nothing where it has no folder yet."""
        if error.errno not in GONE:
            raise error
        if not OUTLASTING:
            begins = f"the terminal is gone ({os.strerror(error.errno)}); output goes on here."
            try:
                log = Log(FOLDERS[-1] / LOG_FILE if FOLDERS else Path(os.devnull), begins, leads=[])
            except OSError:
                log = Log(Path(os.devnull), begins, leads=[])
            OUTLASTING.append(log)
        OUTLASTING[0].take(self.descriptor)
        with contextlib.suppress(OSError):
            self.stream.flush()  # what it holds goes where it leads now

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Let a job outlast its terminal: SIGHUP does not end it, and stdout and stderr go on in its log.

    Signals that are ignored (nohup) stay so. The streams of a notebook or a test are none of the system's, and stay.
    """
    ours = [number for number in GOES_ON if is_main_thread() and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, heard)
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None and not isinstance(stream, Lasting | Told) and is_of_the_system(stream):
            setattr(sys, name, cast(TextIO, Lasting(stream)))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()  # while it may still turn to the log
        sys.stdout, sys.stderr = before


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def is_of_the_system(stream: TextIO) -> bool:
    try:
        return stream.fileno() in (1, 2)
    except (OSError, ValueError, AttributeError):
        return False
