"""Measure trainings side by side on one machine, by how the threads of OpenMP wait for each other. Prints JSON.

    python scripts/benchmarks/bench_beside.py --rounds 3

One, two and three trainings of the demo model's size begin together. Each figure is the speed of one of them over that
of one alone whose threads spin, the default of OpenMP: by the tokens/s of its steps, and by the time of the whole
command, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, machine_facts

from sae_training.machine.interrupt import without_traceback
from sae_training.machine.threads import OWN_SETTINGS

WAYS = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},  # that of libgomp where nothing is set
    "3,000 turns": {"GOMP_SPINCOUNT": "3000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning only while alone": {},  # the package's way
}
ALONE = "OpenMP's default"
SPEEDS = ("tokens/s of the steps", "tokens/s of the whole command")
TRAINED = [
    "--checkpoint_every_minutes",
    "None",
    "--n_eval_batches",
    "0",
    "--log_to_wandb",
    "False",
    "--run_name",
    "run",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--numbers", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    keys = [(way, n) for n in given.numbers for way in given.ways]
    speeds: dict[str, dict[tuple[str, int], list[float]]] = {name: {key: [] for key in keys} for name in SPEEDS}
    for _ in range(given.rounds):
        for way, n in keys:  # interleaved, so that what the machine does besides falls on all
            for name, speed in zip(SPEEDS, trainings(n, way, given.tokens), strict=True):
                speeds[name][way, n].append(speed)
            print(f"{way}, {n}: {speeds[SPEEDS[0]][way, n][-1]:,.0f} tokens/s each", file=sys.stderr)
    facts: dict[str, object] = {"arguments": vars(given)}
    for name, found in speeds.items():
        medians = {key: statistics.median(values) for key, values in found.items()}
        alone = medians.get((ALONE, 1)) or next(iter(medians.values()))
        facts |= {
            f"{name} of one alone": round(alone),
            f"{name}, over that": {
                way: {f"{n} at once": round(medians[way, n] / alone, 3) for n in given.numbers} for way in given.ways
            },
        }
    print(json.dumps(machine_facts() | facts, indent=2))


def trainings(n: int, way: str, tokens: int) -> tuple[float, float]:
    """Return the mean tokens/s of `n` trainings at once, in their steps, and in the time of all of it."""
    own = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(n)]
        began = time.monotonic()
        jobs = [
            subprocess.Popen(
                [sys.executable, "-m", "sae_training", "train", "demo", "demo", "--total_training_tokens", str(tokens)]
                + [*TRAINED, "--run_dir", str(folder)],
                env=own | WAYS[way] | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for folder in folders
        ]  # fmt: skip
        if any([job.wait() for job in jobs]):  # all of them, before the folder goes
            raise SystemExit("a training has failed")
        seconds = time.monotonic() - began
        told = [json.loads((folder / "run" / "status.json").read_text(encoding="utf-8")) for folder in folders]
    return statistics.mean(status["tokens_per_s"] for status in told), tokens / seconds


if __name__ == "__main__":
    with without_traceback():
        main()
