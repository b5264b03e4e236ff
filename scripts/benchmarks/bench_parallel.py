"""Compare runs of several processes with that of one, and two ways to exchange gradients. Prints JSON.

    python scripts/benchmarks/bench_parallel.py same --parallel data --ranks 2 3 --dtype float64
    python scripts/benchmarks/bench_parallel.py exchange

`same` trains each of CASES on the demo model under torchrun (gloo, one thread a process), and compares the log of each
step with that of one process. `exchange` sums gradients of W_dec over two processes as a whole, or only the rows of the
latents that were active.
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
from typing import Any

import torch
import torch.distributed as dist
from machine import ROOT, machine_facts

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.formats.run_files import METRICS_FILE
from sae_training.lm_runner import language_model_sae_runner

CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "l1_coefficient": 1e-3},
    "standard, ghost gradients": {"architecture": "standard", "l1_coefficient": 0.1, "use_ghost_grads": True},
    "standard, resampling": {
        "architecture": "standard", "l1_coefficient": 0.1, "feature_sampling_method": "anthropic",
        "feature_sampling_window": 50,
    },
    "standard, by decoder norms": {
        "architecture": "standard", "l1_coefficient": 1e-3, "scale_sparsity_penalty_by_decoder_norm": True,
    },
    "topk": {"architecture": "topk", "k": 16, "auxk_coefficient": 0.0},
    "topk, AuxK": {"architecture": "topk", "k": 2, "auxk_coefficient": 1 / 32},
    "topk, AuxK, in parts": {"architecture": "topk", "k": 2, "auxk_coefficient": 1 / 32, "micro_batch_size": 100},
    "multi-topk": {"architecture": "topk", "k": 8, "multi_topk": True},
    "batchtopk": {"architecture": "batchtopk", "k": 16},
    "matryoshka": {"architecture": "matryoshka", "k": 16},
    "jumprelu": {"architecture": "jumprelu", "l1_coefficient": 1e-4},
    "jumprelu, target_l0": {"architecture": "jumprelu", "target_l0": 16},
    "gated": {"architecture": "gated", "l1_coefficient": 1e-3},
}  # fmt: skip
BASE: dict[str, Any] = {
    "model_name": "demo", "d_in": None, "hook_point": "blocks.1.hook_resid_post", "dataset_path": "demo",
    "context_size": 64,
    "expansion_factor": 4, "train_batch_size": 256, "store_batch_size": 8, "n_batches_in_buffer": 4,
    "dead_feature_window": 20, "lr_warm_up_steps": 10, "wandb_log_frequency": 1, "eval_every_steps": 0,
    "log_to_wandb": False, "lm_dtype": "float32", "encoder_matmul_dtype": "float32",
}  # fmt: skip
FIRST_STEPS = 20
LOSSES = ("losses/mse_loss", "losses/l1_loss", "losses/ghost_grad_loss", "losses/overall_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    same = verbs.add_parser("same")
    same.add_argument("--parallel", default="data")
    same.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    same.add_argument("--dtype", default="float64")
    same.add_argument("--steps", type=int, default=200)
    exchange = verbs.add_parser("exchange")
    exchange.add_argument("--d", type=int, default=512)
    worker = verbs.add_parser("worker")
    worker.add_argument("what")
    worker.add_argument("request")
    given = parser.parse_args()
    if given.verb == "worker":
        {"train": train_all, "exchange": time_exchanges}[given.what](json.loads(given.request))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(given, Path(folder)) if given.verb == "same" else exchanges(given.d)
    print(json.dumps(machine_facts() | {"arguments": vars(given), "found": found}, indent=2))


def torchrun(n: int, what: str, request: dict[str, Any]) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    process = subprocess.run(
        [*launcher, __file__, "worker", what, json.dumps(request)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if process.returncode:
        raise SystemExit(process.stderr)
    return process.stdout


# ------------------------------------------------------------------------------------------------------- the same run


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return, for each case and number of processes, how far its log is from that of one process."""
    for n in (1, *given.ranks):
        fields = {"dtype": given.dtype, "parallel": given.parallel, "run_dir": str(folder / str(n))}
        torchrun(n, "train", {**fields, "total_training_tokens": given.steps * BASE["train_batch_size"]})
    return {
        case: {
            f"{n} processes": difference(rows(folder / str(n) / case), rows(folder / "1" / case)) for n in given.ranks
        }
        for case in CASES
    }


def train_all(fields: dict[str, Any]) -> None:
    for case, changes in CASES.items():
        language_model_sae_runner(LanguageModelSAERunnerConfig(**{**BASE, **fields, "run_name": case, **changes}))


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if LOSSES[0] in row]


def difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the largest relative differences of losses, how many firings differ, and dead latents."""
    pairs = list(zip(found, expected, strict=True))
    relative = [max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for key in LOSSES) for a, b in pairs]
    firings = sum(row["metrics/l0"] for row in expected)
    dead = [[row["sparsity/dead_features"] for row in rows] for rows in (found, expected)]
    return {
        "losses": max(relative),
        "losses, first steps": max(relative[:FIRST_STEPS]),
        "share of firings": sum(abs(a["metrics/l0"] - b["metrics/l0"]) for a, b in pairs) / firings,
        "steps with other dead latents": sum(
            a["sparsity/dead_features"] != b["sparsity/dead_features"] for a, b in pairs
        ),
        "dead latents at most": max(dead[1]),
    }


# --------------------------------------------------------------------------------------------- exchange of gradients


def exchanges(d: int) -> list[dict[str, Any]]:
    """Return the milliseconds of both ways, and the bytes that leave a process, for several sizes."""
    return json.loads(torchrun(2, "exchange", {"d": d}))


def time_exchanges(request: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    found = []
    for d_sae in (8_192, 65_536):
        for share in (0.02, 0.1, 0.3, 1.0):
            gradient = torch.randn(d_sae, request["d"])
            touched = torch.rand(d_sae, generator=torch.Generator().manual_seed(dist.get_rank())) < share
            times: dict[str, list[float]] = {"dense": [], "touched rows": []}
            n_bytes = 0
            for _ in range(7):
                for name, way in (("dense", dense), ("touched rows", of_touched_rows)):
                    dist.barrier()
                    start = time.perf_counter()
                    n_bytes = way(gradient, touched)
                    times[name].append(time.perf_counter() - start)
            found.append({"d_sae": d_sae, "touched by each": share} | {
                f"{name}, ms": round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()
            } | {"bytes of touched rows": n_bytes, "bytes, dense": gradient.nbytes})  # fmt: skip
    if dist.get_rank() == 0:
        print(json.dumps(found))


def dense(gradient: torch.Tensor, _: torch.Tensor) -> int:
    dist.all_reduce(gradient)
    return gradient.nbytes


def of_touched_rows(gradient: torch.Tensor, touched: torch.Tensor) -> int:
    """Send the rows of those latents that fired on any process; the others are 0 everywhere."""
    anywhere = touched.to(torch.uint8)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    numbers = anywhere.nonzero().flatten()
    rows = gradient.index_select(0, numbers)
    dist.all_reduce(rows)
    gradient.index_copy_(0, numbers, rows)
    return rows.nbytes + anywhere.nbytes


if __name__ == "__main__":
    main()
