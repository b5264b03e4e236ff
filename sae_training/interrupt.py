"""Ctrl-C and SIGTERM, politely: the first asks the loop to save and stop, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop, and did, after saving. `exit_code` is the shell's for that signal (130, 143)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM in `signal`; the next one acts as it would without this.

    Signals reach only the main thread; in another thread (some notebooks) nothing is installed.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.notify = notify
        self.signal: signal.Signals | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.restore()
        self.notify(f"{self.signal.name}: finishing this step, then saving. Once more stops at once, without saving.")

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
