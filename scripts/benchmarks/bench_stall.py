"""Measure how long steps stand still for checkpoints, in the background and in the foreground. Prints JSON.

    python scripts/benchmarks/bench_stall.py --picture docs/images/stall.svg

The demo model's activations train a dictionary of 32,768 latents: a state of 160 MB. In one process, the same run is
made in turns with background and foreground checkpoints. The stall of a checkpoint is what its step takes beyond the
median step; that is compared with one copy of the same state, in memory that is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from machine import machine_facts

from sae_training import lm_runner
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model
from sae_training.machine.interrupt import without_traceback
from sae_training.run import memory_plan
from sae_training.run.background import Background
from sae_training.run.progress import Progress
from sae_training.run.save import content_of
from sae_training.run.state import Run

EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--latents", type=int, default=32_768)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    model = load_language_model("demo")
    found: dict[str, list[dict[str, Any]]] = {"background": [], "foreground": []}
    for _ in range(given.rounds):
        for way in found:
            found[way].append(measured(way, model, given.steps, given.latents))
    if given.picture is not None:
        draw({way: runs[-1]["steps_ms"] for way, runs in found.items()}, given.picture)
    answer: dict[str, Any] = {}
    for way, runs in found.items():
        answer[way] = {
            name: round(statistics.median(run[name] for run in runs), 3)
            for name in ("state_mb", "copy_ms", "median_step_ms", "first_stall_ms", "stall_ms", "stall_over_copy")
        }
    print(json.dumps(machine_facts() | {"arguments": vars(given) | {"picture": str(given.picture)}} | answer, indent=2))


def measured(way: str, model: Any, steps: int, latents: int) -> dict[str, Any]:
    """Return what a run's steps took, and one copy of its state."""
    ends: list[float] = []
    copies: list[float] = []

    def advance(self: Progress) -> None:
        ends.append(time.perf_counter())

    def finish(run: Run) -> None:
        run.take_saved(wait=True)
        parts, _, _ = content_of(run, False)
        background = Background()
        background.copied(parts)
        for _ in range(5):
            began = time.perf_counter()
            background.copied(parts)
            copies.append(time.perf_counter() - began)
        sizes.append(sum(copy.numel() * copy.element_size() for copy in background.copies.values()))

    sizes: list[int] = []
    in_background = way == "background"
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(Progress, "advance", advance),
        patch.object(lm_runner, "finish", finish),
        patch.object(memory_plan, "saves_from_a_copy", lambda cfg, n: in_background),
    ):
        cfg = LanguageModelSAERunnerConfig(
            model_name="demo", dataset_path="demo", hook_point="blocks.2.hook_resid_post", d_in=None, n_latents=latents,
            architecture="topk", k=32, train_batch_size=1024, total_training_tokens=1024 * steps, log_to_wandb=False,
            checkpoint_every_steps=EVERY, checkpoint_every_minutes=None, eval_every_steps=0, run_dir=folder,
            n_batches_in_buffer=32, store_batch_size=16, context_size=128, wandb_log_frequency=1000,
        )  # fmt: skip
        lm_runner.run_config(cfg, model)
    taken = [(after - before) * 1e3 for before, after in zip(ends, ends[1:], strict=False)]  # from the second step on
    saving = [taken[step - 2] for step in range(EVERY, len(taken) + 2, EVERY)]
    median, copy = statistics.median(taken), statistics.median(copies) * 1e3
    stall = statistics.median(saving[1:]) - median
    return {
        "state_mb": sizes[0] / 1e6, "copy_ms": copy, "median_step_ms": median, "first_stall_ms": saving[0] - median,
        "stall_ms": stall, "stall_over_copy": stall / copy, "steps_ms": taken,
    }  # fmt: skip


WIDTH, HEIGHT, LEFT, BOTTOM = 760, 300, 60, 40
COLOURS = {"background": "#2563eb", "foreground": "#d97706"}


def draw(steps: dict[str, list[float]], path: Path) -> None:
    """Draw what each step took, in ms on a logarithmic axis, over the number of the step."""
    low = 10 ** math.floor(math.log10(min(min(taken) for taken in steps.values())))
    high = 10 ** math.ceil(math.log10(max(max(taken) for taken in steps.values())))
    n = max(len(taken) for taken in steps.values()) + 1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * step / n

    def y(ms: float) -> float:
        share = math.log10(ms / low) / math.log10(high / low)
        return 20 + (HEIGHT - BOTTOM - 20) * (1 - share)

    decades = [low * 10**i for i in range(round(math.log10(high / low)) + 1)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *(f'<path d="M{LEFT} {y(ms):.1f}H{WIDTH - 10}" stroke="#e5e7eb"/>' for ms in decades),
        *(f'<text x="{LEFT - 8}" y="{y(ms) + 4:.1f}" text-anchor="end" fill="#374151">{ms:g}</text>' for ms in decades),
        *(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 22}" text-anchor="middle" fill="#374151">{step}</text>'
            for step in range(EVERY, n + 1, EVERY)
        ),
        f'<text x="{LEFT}" y="12" fill="#374151">ms of a step</text>',
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end" fill="#374151">step</text>',
    ]
    for place, (way, taken) in enumerate(reversed(steps.items())):
        points = " ".join(f"{x(number):.1f},{y(ms):.1f}" for number, ms in enumerate(taken, start=2))
        colour = COLOURS[way]
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{LEFT + 120 + 220 * place}" y="12" fill="{colour}">checkpoints in the {way}</text>',
        ]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    with without_traceback():
        main()
