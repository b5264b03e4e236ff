"""What a person sees of a run while it trains: the progress bar, and status.json."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.machine.phases import progress_bar
from sae_training.run.folder import RunFolder

SHOWN = (
    ("loss", "losses/overall_loss", ".3g"),
    ("L0", "metrics/l0", ".1f"),
    ("EV", "metrics/explained_variance", ".3f"),
    ("dead", "sparsity/dead_features", ".0f"),
)

FIGURES = {
    "explained_variance": ("metrics/eval_explained_variance", "metrics/explained_variance"),
    "l0": ("metrics/eval_l0", "metrics/l0"),
    "dead_latents": ("sparsity/dead_features",),
}
"""Figures that status.json has, and what metrics.jsonl calls them: of an evaluation first, then of a step."""


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures for status.json; of several autoencoders, the smallest and the largest of each."""
    found: dict[str, Any] = {}
    for name, keys in FIGURES.items():
        of_each = [next((row[key] for key in keys if key in row), None) for row in rows]
        values = [value for value in of_each if isinstance(value, float | int) and math.isfinite(value)]
        found[name] = None if not values else values[0] if len(rows) == 1 else [min(values), max(values)]
    return found


class Progress:
    """A bar in tokens with loss, L0, explained variance and dead latents; rate and remaining time come from tqdm."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig, folder: RunFolder, first_step: int) -> None:
        self.tokens_per_step = cfg.tokens_per_step
        self.total_steps = cfg.total_training_steps
        self.folder = folder
        self.first_step = first_step
        self.started = time.monotonic()
        self.ended: float | None = None
        self.figures: dict[str, Any] = {}
        self.bar = progress_bar(
            "training",
            total=cfg.total_training_steps * cfg.tokens_per_step,
            unit="tok",
            initial=first_step * cfg.tokens_per_step,
            leave=True,
            smoothing=0.05,  # averages about 20 steps, so that a refill of the buffer does not move the ETA
        )

    def advance(self) -> None:
        self.bar.update(self.tokens_per_step)

    def show(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Show the figures of the last step; of several autoencoders, the smallest and the largest of each figure."""
        if not metrics:
            return
        self.figures = figures_of(metrics)
        ranges = [f"{name} {spread([row[key] for row in metrics], form)}" for name, key, form in SHOWN]
        of_several = [f"{len(metrics)} SAEs"] if len(metrics) > 1 else []
        self.bar.set_postfix_str(", ".join(of_several + ranges), refresh=False)

    def tokens_per_s(self, step: int) -> float:
        """Return the training tokens per second of this process, from its first step to `step`."""
        ended = time.monotonic() if self.ended is None else self.ended
        return (step - self.first_step) * self.tokens_per_step / max(ended - self.started, 1e-9)

    def write_status(self, state: str, step: int, last_checkpoint: Path | None, **figures: Any) -> None:
        rate = self.tokens_per_s(step)
        remaining = (self.total_steps - step) * self.tokens_per_step
        self.folder.write_status(
            state,
            step=step,
            total_steps=self.total_steps,
            n_training_tokens=step * self.tokens_per_step,
            tokens_per_s=round(rate, 1),
            eta_s=round(remaining / rate) if rate else None,
            last_checkpoint=str(last_checkpoint) if last_checkpoint else None,
            **self.figures | figures,
        )

    def close(self) -> None:
        """Take the time: training is over, and what comes after it is not part of its rate."""
        self.ended = time.monotonic() if self.ended is None else self.ended
        self.bar.close()


def spread(values: Sequence[float], form: str) -> str:
    """Return the smallest and the largest value; one number if they look the same."""
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return "-".join(ends)
