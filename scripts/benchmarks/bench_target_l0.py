"""Trains jumprelu at several values of target_l0, and topk at the same k, and prints how near each comes, as JSON.

    python scripts/benchmarks/bench_target_l0.py --run_dir runs                    the demo model, 500k and 2M rows
    ... --model MODEL --dataset TEXT --hook_point HOOK --options '--store_batch_size 16' --rows 500000 --targets 20

Every run is one of the command line, with its recipe, from one cache of activations: MODEL's at HOOK, written first if
it is not there. What a run's evaluation on held-out text says is kept in its folder, so the same command goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from sae_training.machine.interrupt import without_traceback
from sae_training.machine.run_files import EVALUATION_FILE
from scripts.benchmarks.machine import machine_facts

KEPT = {
    "l0": "metrics/eval_l0",
    "explained_variance": "metrics/eval_explained_variance",
    "ce_score": "metrics/CE_loss_score",
    "silent": "metrics/eval_dead_fraction",
    "rows_evaluated": "base/rows",
}
CACHED_ROWS = 2_150_000  # more than the longest run, which else meets the cache's end with a full buffer left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the caches and runs")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--hook_point", default="blocks.2.hook_resid_post")
    parser.add_argument("--options", type=shlex.split, default=[], help="for `cache` and `train` alike, in one word")
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 2_000_000])
    parser.add_argument("--targets", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--expansion_factor", type=int, default=4)
    args = parser.parse_args()
    cache(args)
    for n_rows in args.rows:
        for target in args.targets:
            both = {name: trained(args, n_rows, target, name) for name in ("jumprelu", "topk")}
            jumprelu, topk = both["jumprelu"], both["topk"]
            line = {
                "model": args.model,
                "rows": n_rows,
                "target_l0": target,
                **both,
                "l0_off_by": round(jumprelu["l0"] / target - 1, 4),
                "explained_variance_above_topk": round(jumprelu["explained_variance"] - topk["explained_variance"], 4),
            }
            print(json.dumps(line), flush=True)
    print(json.dumps(machine_facts()))


def cache(args: argparse.Namespace) -> None:
    """Write the activations that every run reads."""
    command(args, "cache", "--total_training_tokens", CACHED_ROWS)


def trained(args: argparse.Namespace, n_rows: int, target: int, architecture: str) -> dict[str, Any]:
    """Return what the evaluation of a run says, under short names; a finished run is read, not repeated."""
    run = args.run_dir / f"{architecture}{target}-{n_rows}"
    target_words = ("--target_l0", target) if architecture == "jumprelu" else ("--k", target)
    command(
        args,
        "train",
        *("--architecture", architecture, *target_words, "--expansion_factor", args.expansion_factor),
        *("--total_training_tokens", n_rows, "--use_cached_activations", True),
        *("--run_dir", args.run_dir, "--run_name", run.name),
    )
    evaluation = json.loads((run / "final" / EVALUATION_FILE).read_text())
    return {name: evaluation[key] for name, key in KEPT.items()}


def command(args: argparse.Namespace, verb: str, *words: object) -> None:
    """Run a verb of the command line; what it prints goes to stderr."""
    own = ("--hook_point", args.hook_point, "--cached_activations_path", args.run_dir / "activations")
    told = [sys.executable, "-m", "sae_training", verb, args.model, args.dataset, *args.options, *own, *words]
    subprocess.run([str(word) for word in told], stdout=sys.stderr, check=True)


if __name__ == "__main__":
    with without_traceback():
        main()
