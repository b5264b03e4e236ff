"""Signals to a job. Of Ctrl-C and SIGTERM the first asks it to save and stop, the second stops it at once.

SIGUSR1 asks it to save and go on. SIGHUP, which a terminal sends when it closes, ends nothing.

The training loop asks after each step whether a stop is wanted. All else that takes long (filling a buffer, an
evaluation, checking a file, drawing a report) calls `stop_point` between two passes of the language model or after some
megabytes, and leaves its state such that it can be done again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

TOGETHER = 10.0  # seconds within which several SIGTERMs to the processes of a job are one

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOES_ON = tuple(number for name in ("SIGUSR1", "SIGHUP") if (number := getattr(signal, name, None)) is not None)
"""After which a job goes on; Windows has neither."""


class StopAsked(KeyboardInterrupt):
    """Raised at a `stop_point` once a stop was asked for. Who holds the `StopRequest` saves, and says what is saved."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped because it was asked to, after saving. `exit_code` is the shell's for the signal (130, 143)."""

    is_told = False
    """Whether another process of the job says it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows of it: the message alone."""
        return [str(self)]


@contextlib.contextmanager
def without_traceback(saved: str = "The same command begins anew, or goes on from what is saved.") -> Iterator[None]:
    """Leave a script at Ctrl-C with one message in place of a traceback: what is saved, and how to go on.

    `saved` says it where the interruption itself does not, because nothing in the block has prepared for it.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"\n{str(stop) or f'Stopped. {saved}'}\n")
        sys.exit(getattr(stop, "exit_code", 128 + signal.SIGINT))


def stop_point() -> None:
    """Raise StopAsked, in any thread, if the job of this process was asked to stop."""
    if any(request.signal is not None for request in HEEDED):
        raise StopAsked


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is noted in `signal`, and a second one ends the process.

    Python runs signal handlers between two bytecodes of the main thread, so during a long matrix product two signals
    would count as one, seconds late. The interpreter writes a byte for each signal to its wakeup file at once, and a
    thread reads it there. Ending the process loses nothing, because every file of a run is written whole or not at all,
    and the system releases its lock. In a notebook or an interactive session a second signal raises KeyboardInterrupt
    instead, so that the session goes on. Outside the main thread the context does nothing.
    """

    def __init__(self, notify: Callable[[str], None], by_agreement: bool = False, saves: bool = False) -> None:
        self.notify = notify
        self.by_agreement = by_agreement
        self.saves = saves
        """Whether the job saves when it is asked to; others have on the disk what they have finished."""
        self.asked: signal.Signals | None = None
        """The first signal."""
        self.signal: signal.Signals | None = None
        """The signal that is heeded: `asked`, but with `by_agreement` only once all processes of the job know of it."""
        self.asked_at = 0.0
        self.save_asked = False
        """Whether SIGUSR1 has asked to save, which is to be done after the step."""
        self.at_once = False
        self.n_handled = 0
        self.installed = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.read_end, self.write_end = os.pipe()
            os.set_blocking(self.write_end, False)
            self.previous_wakeup = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
            self.previous: dict[int, Any] = {number: signal.signal(number, self.handle) for number in SIGNALS}
            for number in GOES_ON:
                self.previous[number] = signal.signal(number, heard)
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()
            self.installed = True
            HEEDED.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.installed:
            HEEDED.remove(self)
            for number, handler in self.previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.previous_wakeup)
            os.close(self.write_end)  # so that the watcher reads the end of the file, and ends
            self.watcher.join()
            os.close(self.read_end)
            self.installed = False

    def watch(self) -> None:
        while received := os.read(self.read_end, 1):
            if received[0] in SIGNALS:
                self.note(signal.Signals(received[0]))
            elif received[0] in GOES_ON:
                self.go_on(signal.Signals(received[0]))

    def note(self, number: signal.Signals) -> None:
        if self.asked is None:
            self.asked, self.asked_at = number, time.monotonic()
            self.signal = None if self.by_agreement else number
            self.notify(f"{number.name}: finishing this step, then saving. Once more stops at once, without saving.")
        elif self.by_agreement and number == signal.SIGTERM and time.monotonic() < self.asked_at + TOGETHER:
            pass  # torchrun hands on to its processes what a terminal or a queue has told them too
        elif is_interactive():
            self.at_once = True
        else:
            os._exit(128 + number)

    def go_on(self, number: signal.Signals) -> None:
        if number.name == "SIGHUP":
            self.notify("SIGHUP: the terminal is closed; this goes on without it.")
            return
        self.save_asked = self.saves
        done = "saving after this step" if self.saves else "what is finished is on the disk"
        self.notify(f"{number.name}: {done}; this goes on.")

    def takes_save(self) -> bool:
        """Return whether a save was asked for since the last call."""
        asked, self.save_asked = self.save_asked, False
        return asked

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, which may run before the watcher has seen the signal, or long after."""
        self.n_handled += 1
        if self.at_once or (self.n_handled > 1 and is_interactive()):
            raise KeyboardInterrupt


def heard(number: int, frame: FrameType | None) -> None:
    """Python's handler of what ends nothing."""


HEEDED: list[StopRequest] = []
"""The requests that signals go to now: one or, where a job starts another, two."""


def is_interactive() -> bool:
    """Return whether a person types to this process, at a prompt or in a notebook.

    A program that runs notebooks imports ipykernel too, but is no kernel itself.
    """
    kernel = sys.modules.get("ipykernel.kernelapp")
    return hasattr(sys, "ps1") or (kernel is not None and kernel.IPKernelApp.initialized())
