"""What a person sees of a job's phases: a bar or a line for each over two seconds, and at the end how long each took.

On a terminal or in a notebook there are bars. Elsewhere, as in the log file of a cluster's job, there is a line after
two seconds and then one every 30, for what has no bar too. TQDM_DISABLE=1 turns off both; messages stay.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

from sae_training.machine.interrupt import is_interactive

SHOWN_AFTER = 2.0  # seconds
LINE_EVERY = 30.0


class Bar(Protocol):
    """The part of tqdm's face that is used. A bar is a context, which closes it."""

    def update(self, n: int) -> object: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> object: ...

    def close(self) -> object: ...

    def __enter__(self) -> Bar: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> object: ...


def progress_bar(
    desc: str, total: int, unit: str, initial: int = 0, leave: bool = False, smoothing: float = 0.3
) -> Bar:
    """Return a bar, or what writes lines in its place. `leave`: it stays on the screen, and is there from the start."""
    if not shows_bars():
        return Lines(desc, total, unit, initial, silent=is_turned_off())
    return tqdm(
        desc=desc, total=total, unit=unit, initial=initial, leave=leave, smoothing=smoothing,
        unit_scale=True, delay=0 if leave else SHOWN_AFTER,
    )  # fmt: skip


def shows_bars() -> bool:
    """Return whether bars are to be shown: there is a terminal or a notebook, and nothing turns them off."""
    return not is_turned_off() and (sys.stderr.isatty() or is_interactive())


def is_speaker() -> bool:
    """Return whether this process says what it does: of those that torchrun has started, the first one alone."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def is_turned_off() -> bool:
    return not is_speaker() or os.environ.get("TQDM_DISABLE", "").strip().lower() not in ("", "0", "false", "no", "off")


class Lines:
    """Writes a line to stderr after two seconds, then every 30 seconds, and one at the end if there was any."""

    def __init__(self, desc: str, total: int, unit: str, initial: int = 0, silent: bool = False) -> None:
        self.desc, self.total, self.unit, self.silent = desc, total, unit, silent
        self.initial = self.n = initial
        self.postfix = ""
        self.started = time.monotonic()
        self.next_line = self.started + SHOWN_AFTER
        self.has_spoken = self.is_closed = False

    def update(self, n: int) -> None:
        self.n += n
        if time.monotonic() >= self.next_line and self.n < self.total:
            self.speak()

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self.postfix = s

    def close(self) -> None:
        if not self.is_closed and (self.has_spoken or time.monotonic() - self.started >= SHOWN_AFTER):
            self.speak()
        self.is_closed = True

    def speak(self) -> None:
        now = time.monotonic()
        self.has_spoken, self.next_line = True, now + LINE_EVERY
        seconds = max(now - self.started, 1e-9)
        rate = (self.n - self.initial) / seconds
        parts = [
            f"{self.n / max(self.total, 1):4.0%} of {tqdm.format_sizeof(self.total)} {self.unit}",
            f"{tqdm.format_sizeof(rate)} {self.unit}/s",
            tqdm.format_interval(seconds),
        ]
        if rate > 0 and self.n < self.total:
            parts.append(f"{tqdm.format_interval((self.total - self.n) / rate)} left")
        if self.postfix:
            parts.append(self.postfix)
        if not self.silent:
            sys.stderr.write(f"{self.desc}: {', '.join(parts)}\n")
            sys.stderr.flush()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# -------------------------------------------------------------------------------------------------------------- times


class Phases:
    """How long each phase of a job took, in seconds; a phase within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.since = time.perf_counter()

    def count(self) -> None:
        """Count the time since the last change for the innermost open phase."""
        now = time.perf_counter()
        name = self.open[-1] if self.open else "other"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def line(self) -> str:
        """Return the phases of at least a tenth of a second, in the order in which they began."""
        self.count()
        other = self.seconds.get("other", 0.0)
        took = {name: seconds for name, seconds in self.seconds.items() if name != "other"} | {"other": other}
        parts = [f"{name} {shown(seconds)}" for name, seconds in took.items() if seconds >= 0.1]
        return f"Time: {', '.join(parts)}; {shown(sum(took.values()))} in all."


def shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else tqdm.format_interval(seconds)


COUNTED: list[Phases] = []
"""Where phases count now: the innermost job's."""


@contextmanager
def counted_phases() -> Iterator[Phases]:
    """In here phases count for one job: the one around it, if there is one."""
    if COUNTED:
        yield COUNTED[-1]
        return
    COUNTED.append(Phases())
    try:
        yield COUNTED[-1]
    finally:
        COUNTED.pop()


@contextmanager
def phase(name: str, has_bar: bool = False) -> Iterator[None]:
    """Count what runs in here as the phase `name`; unless it has a bar, a line says so after two seconds.

    Where there are no bars, another says it every 30 seconds, as `progress_bar` does there.
    """
    phases = COUNTED[-1] if COUNTED and threading.current_thread() is threading.main_thread() else None
    ended = threading.Event()
    if not has_bar and not is_turned_off():
        threading.Thread(target=say_until, args=(name, ended), daemon=True).start()
    if phases is not None:
        phases.count()
        phases.open.append(name)
        phases.seconds.setdefault(name, 0.0)
    try:
        yield
    finally:
        ended.set()
        if phases is not None:
            phases.count()
            phases.open.pop()


def say_until(name: str, ended: threading.Event) -> None:
    """Say that the phase `name` is under way until it has ended, at the times of `Lines`; on a terminal once."""
    started = time.monotonic()
    if ended.wait(SHOWN_AFTER):
        return
    say(f"{name} ...")
    while not shows_bars() and not ended.wait(LINE_EVERY):
        say(f"{name} ... {tqdm.format_interval(time.monotonic() - started)}")


def say(line: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr, nolock=False):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
