"""What a job of any kind tells of itself in its folder: status.json, and while it lives who works there.

`sae-training runs` reads it (`jobs.found`). Of several processes the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sae_training.machine.files import NotEnoughDisk, disk_named, write_text
from sae_training.machine.holder import Heartbeat, this_process, write_holder
from sae_training.machine.log import ACTIVE, keep_in
from sae_training.machine.run_files import HOLDER_FILE, STATUS_FILE
from sae_training.machine.threads import spin_only_while_alone
from sae_training.parallel.ranks import is_first

Kind = Literal["train", "cache", "build", "toy", "pretokenize"]

WRITTEN_EVERY = 5.0  # seconds, by `progress`


class Record:
    """The record of the job that works in `folder`. As a context it ends with the state that the job has come to."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        self.started = time.time()
        self.heartbeat: Heartbeat | None = None
        self.figures: dict[str, Any] = {}
        """Those of the last `progress`."""
        self.first: tuple[int, float] | None = None
        """The step of the first `progress`, and when it was."""
        self.next_write = 0.0

    def begin(self) -> None:
        """Say that this process works in the folder, for as long as it lives or until `end`."""
        spin_only_while_alone()
        if not is_first():
            keep_in(self.folder)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with disk_named(self.folder):
            write_holder(self.folder, this_process(timestamp(self.started)))
        self.heartbeat = Heartbeat(self.folder / HOLDER_FILE)
        keep_in(self.folder)

    def end(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None
            with contextlib.suppress(OSError):
                (self.folder / HOLDER_FILE).unlink()

    def write(self, state: str, **figures: Any) -> None:
        """Rewrite status.json, whole or not at all. `state`: training, interrupted, failed or finished.

        A disk that is full keeps the old one: no job ends for it.
        """
        if not is_first():
            return
        content = {
            "kind": self.kind,
            "state": state,
            **figures,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": timestamp(self.started),
            "updated": timestamp(time.time()),
        }
        with contextlib.suppress(NotEnoughDisk):
            write_text(self.folder / STATUS_FILE, json.dumps(content, indent=2) + "\n")

    def progress(self, step: int, total: int, tokens_per_step: int, **figures: Any) -> None:
        """Say how far the job is, at most every five seconds."""
        now = time.monotonic()
        if self.first is None:
            self.first = step, now
        done, seconds = step - self.first[0], max(now - self.first[1], 1e-9)
        self.figures = {
            "step": step,
            "total_steps": total,
            "tokens_per_s": round(done * tokens_per_step / seconds, 1),
            "eta_s": round((total - step) / done * seconds) if done else None,
            **figures,
        }
        if now >= self.next_write:
            self.next_write = now + WRITTEN_EVERY
            self.write("training", **self.figures)

    def __enter__(self) -> Record:
        self.begin()
        self.write("training")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed" if error else "finished"
            # A disk that is full must not hide what went wrong first, which may well be the same.
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self.write(state, **self.figures)
        finally:
            self.end()


def record_of_detached(kind: Kind, folder: Path) -> contextlib.AbstractContextManager[Record | None]:
    """Return the record of a job whose folder can hold none: in its ticket if it is detached, else there is none.

    What is said without a terminal is beside the folder then.
    """
    ticket = ACTIVE[0].ticket if ACTIVE else None
    if ticket is not None:
        return Record(ticket, kind)
    keep_in(folder.absolute().parent)
    return contextlib.nullcontext()


def timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
