"""What a detached job says: all of it goes to a log file, and to the terminal of its tmux session if it has one.

The log begins beside the job's folder and moves into it once the job has one (`keep_in`). The terminal shows bars. Of a
line that is written over, as bars are, the log keeps one in 30 seconds, so it is lines that can be read. The system's
own stdout and stderr lead to the log, which therefore also has what libraries in C and other processes say.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_training.machine.run_files import LOG_FILE

TICKET = "SAE_TRAINING_DETACHED"
"""The variable that tells a process that it is a detached job: the folder that the log begins in, its ticket."""

PLACE_FILE = "place.json"  # in the ticket: the job's folder, and where in its log this job's part begins

KEPT_EVERY = 30.0  # seconds, as `phases.LINE_EVERY`
WAITS_FOR_TERMINAL = 0.5  # seconds, because one that works needs a moment for a long text

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what moves the cursor or colours


class Log:
    """The log of this process, from now on. `terminal`: the descriptor of a terminal that shows the same, if any.

    `ticket`: the folder that the log of a detached job begins in. `leads`: the descriptors that lead to the log.
    """

    def __init__(
        self,
        file: Path,
        begins: str,
        terminal: int | None = None,
        ticket: Path | None = None,
        leads: Sequence[int] = (1, 2),
    ) -> None:
        self.begins, self.ticket, self.terminal = begins, ticket, terminal
        self.is_stopped = False
        self.leads: list[int] = []
        self.descriptor: int | None = None
        self.lead_to(file)
        for number in leads:
            self.take(number)
        self.say_that_it_begins()

    def lead_to(self, file: Path) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor, self.file = descriptor, file
        for number in self.leads:
            os.dup2(descriptor, number)

    def take(self, number: int) -> None:
        """Let one of the system's descriptors lead to the log."""
        assert self.descriptor is not None
        os.dup2(self.descriptor, number)
        self.leads.append(number)

    def say_that_it_begins(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self.write(f"[{now}, process {os.getpid()}] {self.begins}")

    def write(self, line: str) -> None:
        assert self.descriptor is not None
        with contextlib.suppress(OSError):  # a full disk must not end the job
            os.write(self.descriptor, f"{line}\n".encode(errors="backslashreplace"))

    def show(self, text: str) -> None:
        """Show text on the terminal, as far as that takes it: it may be stopped (Ctrl-S) or gone, and the log has all.

        It is waited for once, until it takes something again.
        """
        left, ends = text.encode(errors="backslashreplace"), time.monotonic() + WAITS_FOR_TERMINAL
        while left and self.terminal is not None:
            try:
                left = left[os.write(self.terminal, left) :]
                self.is_stopped = False
            except BlockingIOError:
                self.is_stopped = self.is_stopped or time.monotonic() > ends
                if self.is_stopped:
                    return
                time.sleep(0.005)
            except OSError:
                self.terminal = None

    def move_to(self, folder: Path) -> None:
        """Go on in the folder's log, after what is there, with what was said until now."""
        file = folder / LOG_FILE
        if self.ticket is None or self.file == file or folder == self.ticket:
            return
        begins = file.stat().st_size if file.exists() else 0
        try:
            if begins:
                raise FileExistsError
            os.rename(self.file, file)  # which stays open, also for who reads along
            self.file = file
        except OSError:  # there is one, or it is another disk
            said, old = self.file.read_bytes(), self.file
            with file.open("ab") as there:
                there.write(said)
            self.lead_to(file)
            old.unlink()
        place = {"folder": str(folder.absolute()), "log_begins": begins}
        partial = self.ticket / f"{PLACE_FILE}.tmp"
        partial.write_text(json.dumps(place) + "\n", encoding="utf-8")
        os.replace(partial, self.ticket / PLACE_FILE)


class Told(io.TextIOBase):
    """A stream in place of sys.stdout or sys.stderr that shows all on the terminal, and writes lines to the log."""

    encoding = "utf-8"  # for tqdm, which draws by it

    def __init__(self, log: Log) -> None:
        self.log = log
        self.line = ""
        self.kept_at = time.monotonic()

    def write(self, text: str, /) -> int:
        self.log.show(text)
        for part in re.split(r"([\r\n])", text):
            if part == "\n":
                self.log.write(ESCAPES.sub("", self.line))
                self.line = ""
            elif part != "\r":
                self.line += part
            else:
                self.write_over()
        return len(text)

    def write_over(self) -> None:
        """Let the line go, at which the cursor is; after 30 seconds without one, keep it."""
        if self.line.strip() and time.monotonic() - self.kept_at >= KEPT_EVERY:
            self.log.write(ESCAPES.sub("", self.line).rstrip())
            self.kept_at = time.monotonic()
        self.line = ""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.log.terminal is not None

    def fileno(self) -> int:
        return 2 if self.log.terminal is None else self.log.terminal


ACTIVE: list[Log] = []
"""The log of this process, if it is a detached job."""


def is_detached() -> bool:
    return bool(ACTIVE)


@contextlib.contextmanager
def told_to_log(words: Sequence[str]) -> Iterator[None]:
    """In here, a process that was started as a detached job writes its log; any other is left as it is."""
    ticket = os.environ.pop(TICKET, None)
    if ticket is None:
        yield
        return
    log = Log(Path(ticket) / LOG_FILE, shlex.join(words), terminal_of_stderr(), Path(ticket))
    ACTIVE.append(log)
    before: Any = sys.stdout, sys.stderr
    told = sys.stdout, sys.stderr = Told(log), Told(log)
    try:
        yield
    finally:
        for stream in told:
            if stream.line:
                stream.write("\n")
        ACTIVE.clear()
        sys.stdout, sys.stderr = before


def terminal_of_stderr() -> int | None:
    """Return a descriptor of the terminal that stderr leads to, whose writes never wait; None if it leads to none."""
    if not os.isatty(2):
        return None
    try:  # opened anew, because others have stderr's, and may want to wait
        return os.open(os.ttyname(2), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # as in a container that does not show it
        descriptor = os.dup(2)
        os.set_blocking(descriptor, False)
        return descriptor


FOLDERS: list[Path] = []
"""The folder that the job of this process works in, where its log belongs."""

OUTLASTING: list[Log] = []
"""The log of what this process says where its terminal is gone (`terminal`)."""


def keep_in(folder: Path) -> None:
    """Let the log lie in the folder that the job works in from now on."""
    FOLDERS[:] = [folder]
    for log in ACTIVE:
        log.move_to(folder)
    for log in OUTLASTING:
        if log.file != folder / LOG_FILE:
            with contextlib.suppress(OSError):
                log.lead_to(folder / LOG_FILE)
                log.say_that_it_begins()
