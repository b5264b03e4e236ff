"""The log of an autoencoder's training: every row to metrics.jsonl, and the same rows to wandb where that is wanted.

metrics.jsonl is the record, wandb its mirror: nothing that goes wrong with wandb reaches training, or delays a step.
The file holds no wall-clock values, so that a run that was stopped and resumed leaves the same bytes as one that was
not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from sae_training.machine.files import NotEnoughDisk, disk_named
from sae_training.machine.run_files import METRICS_FILE
from sae_training.report.in_words import BASE
from sae_training.run.wandb_mirror import WandbMirror
from sae_training.run.wandb_run import Artifact, Notify, WandbOptions

HISTOGRAM_BINS = 64


class RunLogger:
    """Appends rows to `folder/metrics.jsonl` and mirrors them to wandb.

    `resume_at` is a `position()` that a checkpoint kept: rows after that byte are dropped, so 0 begins the file anew.
    `wandb` None means no wandb, and `config` is what wandb shows of the run. A wandb run that the caller has already
    opened (as the function of a sweep does) is used and left open; the loggers of a group then share it, each with the
    name of its folder before its keys. `notify` is told, once each, what keeps wandb from working.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        wandb: WandbOptions | None = None,
        resume_at: int = 0,
        notify: Notify = print,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        cut_back(self.path, resume_at, notify)
        self._file = self.path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._notify, self._disk_was_full = notify, False
        self._wandb = WandbMirror(folder, notify)
        if wandb is not None:
            self._wandb.start(wandb, dict(config))

    def log(self, row: Mapping[str, float | int], step: int, tokens: int) -> None:
        """Write one row, with null for NaN and infinities (strict JSON), which wandb shows as NaN.

        Steps must not decrease: wandb drops rows of an earlier step than the last. What the figures are over (`base/`)
        is left out, because it is the same in each row of a run; evaluation.json has it.
        """
        numbers = {"details/n_training_tokens": tokens} | {
            key: value if isinstance(value, int) else float(value)
            for key, value in row.items()
            if not key.startswith(BASE)
        }
        self._write({"step": step} | {key: value if math.isfinite(value) else None for key, value in numbers.items()})
        self._wandb.check()

    def log_beside(self, values: Mapping[str, Any], step: int) -> None:
        """Send to wandb alone, with the row of the step: what differs from one execution to the next, such as tokens/s,
        and words that it shows in place of the figures of the same names.
        """
        self._wandb.log_beside(values, step)

    def alert(self, title: str, text: str) -> None:
        """Send an alert to wandb, which mails it to those who want that."""
        self._wandb.alert(title, text)

    def log_histogram(self, key: str, values: Tensor, step: int) -> None:
        """Write the distribution of the finite values as `{"counts": [64], "edges": [65]}`."""
        numbers = values.detach().flatten().cpu().double().numpy()
        counts, edges = np.histogram(numbers[np.isfinite(numbers)], bins=HISTOGRAM_BINS)
        self._write({"step": step, key: {"counts": counts.tolist(), "edges": edges.tolist()}})

    def log_artifact(self, artifact: Artifact) -> None:
        """Send files to wandb alone. They must stay as they are."""
        self._wandb.log_artifact(artifact)

    def position(self) -> int:
        """Return the length of metrics.jsonl in bytes. Raise NotEnoughDisk while rows of it have no room."""
        self._write_waiting()
        return self._file.tell()

    def flush_to_disk(self) -> None:
        """Wait until the rows of the last `position()` are on the disk. Another thread may call this."""
        with disk_named(self.path.parent):
            os.fsync(self._file.fileno())

    def close(self, exit_code: int = 0) -> None:
        """End both records, waiting at most about `finish_timeout_s` for wandb. Closing twice does no harm."""
        try:
            if not self._file.closed:
                self._write_waiting()  # once more, if there was no room for some rows
        finally:
            self._file.close()
            self._wandb.finish(exit_code)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _write(self, row: dict[str, Any]) -> None:
        """Write a row, and those before it that had no room: a disk that is full does not stop training."""
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._write_waiting()
            self._disk_was_full = False
        except NotEnoughDisk as error:
            if not self._disk_was_full:
                self._notify(f"{self.path}: rows are kept in memory until there is room for them. {error}")
            self._disk_was_full = True

    def _write_waiting(self) -> None:
        with disk_named(self.path.parent):
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]


class UnheardLogger(RunLogger):
    """Takes what is logged and keeps nothing, because another process logs the same."""

    def __init__(self) -> None:
        self._file = Path(os.devnull).open("ab", buffering=0)  # noqa: SIM115 - closed by `close`, as that it stands for
        self._waiting = bytearray()
        self._wandb = WandbMirror(Path(), notify=print)

    def _write(self, row: dict[str, Any]) -> None:
        pass

    def close(self, exit_code: int = 0) -> None:
        self._file.close()


def cut_back(path: Path, length: int, notify: Notify) -> None:
    """Shorten the file to `length` bytes, or to the last whole line before that."""
    present = path.read_bytes()[:length] if path.exists() else b""
    kept = present[: present.rfind(b"\n") + 1]
    if len(kept) != length:
        notify(
            f"{path}: found {len(kept)} bytes of whole rows, expected the {length} that the checkpoint names; "
            "going on with those that are there"
        )
    if path.exists():
        os.truncate(path, len(kept))
