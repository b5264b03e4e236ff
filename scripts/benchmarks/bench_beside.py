"""Measure trainings side by side on one machine, by how the threads of OpenMP wait for each other. Prints JSON.

    python scripts/benchmarks/bench_beside.py --rounds 3

One, two and three trainings of the demo model's size begin together. Each figure is the tokens/s of one of them in its
own steps, without start-up, over that of a training alone whose threads spin: the default of OpenMP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
    rates: dict[tuple[str, int], list[float]] = {(way, n): [] for n in given.numbers for way in given.ways}
    for _ in range(given.rounds):
        for way, n in rates:  # interleaved, so that what the machine does besides falls on all
            rates[way, n].append(statistics.mean(trainings(n, way, given.tokens)))
            print(f"{way}, {n}: {rates[way, n][-1]:,.0f} tokens/s each", file=sys.stderr)
    medians = {key: statistics.median(found) for key, found in rates.items()}
    alone = medians.get((ALONE, 1)) or next(iter(medians.values()))
    table = {way: {f"{n} at once": round(medians[way, n] / alone, 3) for n in given.numbers} for way in given.ways}
    facts = {"arguments": vars(given), "tokens/s alone": round(alone), "of one alone": table}
    print(json.dumps(machine_facts() | facts, indent=2))


def trainings(n: int, way: str, tokens: int) -> list[float]:
    """Return the tokens/s of each of `n` trainings at once."""
    own = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(n)]
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
        told = [json.loads((folder / "run" / "status.json").read_text(encoding="utf-8")) for folder in folders]
    return [status["tokens_per_s"] for status in told]


if __name__ == "__main__":
    with without_traceback():
        main()
