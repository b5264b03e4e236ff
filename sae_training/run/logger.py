"""What a run logs: every row to metrics.jsonl, and the same rows to wandb when wandb is there.

metrics.jsonl is the record of the run and wandb a mirror of it, so nothing that goes wrong with wandb
ever reaches training. The file holds no wall-clock values: a run that was stopped and resumed leaves
the same bytes as one that was not. This is the only module that imports wandb, and it does so only
when a run wants it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sae_training.report.metrics_file import METRICS_FILE
from sae_training.run.wandb_mirror import Notify, _WandbMirror

if TYPE_CHECKING:
    from types import TracebackType


HISTOGRAM_BINS = 64


class RunLogger:
    """Appends rows to `folder/metrics.jsonl` and mirrors them to wandb.

    `resume_at` is the `position()` a checkpoint kept: whatever the file holds after that byte is
    dropped, so 0 starts it anew. `wandb_mode` is "online", "offline" or "disabled"; None takes
    WANDB_MODE, and without that online if wandb finds an API key, else offline. A wandb run that the
    caller has already opened (as the function of a sweep does) is used and left open. `notify` is
    told, once each, what keeps wandb from working.

    Loggers of a `wandb_group` have a wandb run each, at the same time, or where the caller has opened one share it,
    with the name of the folder before their keys. `beside` is the group's first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        log_to_wandb: bool,
        wandb_project: str | None = None,
        wandb_entity: str | None = None,
        wandb_group: str | None = None,
        run_name: str | None = None,
        wandb_mode: str | None = None,
        resume_at: int = 0,
        beside: RunLogger | None = None,
        notify: Notify = print,
        init_timeout_s: float = 30.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        _cut_back(self.path, resume_at, notify)
        self._file = self.path.open("ab")
        self._wandb = _WandbMirror(folder, notify)
        mode = wandb_mode or os.environ.get("WANDB_MODE") or None
        if beside is not None and beside._wandb.is_offline:
            mode = "offline"
        if log_to_wandb and mode != "disabled":
            self._wandb.start(
                mode,
                config=dict(config),
                project=wandb_project,
                entity=wandb_entity,
                group=wandb_group,
                name=run_name,
                init_timeout_s=init_timeout_s,
                finish_timeout_s=finish_timeout_s,
            )

    @property
    def wandb_url(self) -> str | None:
        """The page of the wandb run; None when it is offline or off."""
        return self._wandb.url

    def log(self, row: Mapping[str, float | int], step: int, tokens: int) -> None:
        """Write one row: to wandb as it is, to the file with null for NaN and infinities (strict JSON).

        In wandb the steps must not decrease: rows for an earlier step than the last are dropped there.
        """
        numbers = {"details/n_training_tokens": tokens} | {
            key: value if isinstance(value, int) else float(value) for key, value in row.items()
        }
        self._write({"step": step} | {key: _finite(value) for key, value in numbers.items()})
        self._wandb.log(numbers, step)

    def log_timing(self, row: Mapping[str, float | int], step: int) -> None:
        """Send values that differ from one execution to the next, such as tokens/s, to wandb alone."""
        self._wandb.log(dict(row), step)

    def log_histogram(self, key: str, values: Tensor, step: int) -> None:
        """Write the distribution of the finite values as `{"counts": [64], "edges": [65]}`."""
        numbers = values.detach().flatten().cpu().double().numpy()
        counts, edges = np.histogram(numbers[np.isfinite(numbers)], bins=HISTOGRAM_BINS)
        self._write({"step": step, key: {"counts": counts.tolist(), "edges": edges.tolist()}})
        self._wandb.log_histogram(key, counts, edges, step)

    def log_artifact(
        self,
        name: str,
        artifact_type: str,
        paths: Sequence[Path],
        *,
        metadata: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Hand files to wandb; they are not copied, so they must stay until the run is closed."""
        self._wandb.log_artifact(name, artifact_type, paths, dict(metadata or {}), list(aliases))

    def position(self) -> int:
        """Length of metrics.jsonl in bytes, everything up to there being safely on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self, exit_code: int = 0) -> None:
        """End both records, waiting at most about `finish_timeout_s` for wandb; twice does no harm."""
        self._file.close()
        self._wandb.finish(exit_code)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()


"""Those with a wandb run of their own: several autoencoders have one each."""


def _cut_back(path: Path, length: int, notify: Notify) -> None:
    """Shorten the file to `length` bytes, or to the last whole line before that."""
    present = path.read_bytes()[:length] if path.exists() else b""
    kept = present[: present.rfind(b"\n") + 1]
    if len(kept) != length:
        notify(
            f"{path}: found {len(kept)} bytes of whole rows where the checkpoint expects {length}; going on with those"
        )
    if path.exists():
        os.truncate(path, len(kept))


def _finite(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
