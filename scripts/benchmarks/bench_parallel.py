"""Compare runs of several processes with that of one and with their plan, and ways to exchange gradients. Prints JSON.

    python scripts/benchmarks/bench_parallel.py same --parallel data --ranks 2 3 --dtype float64
    python scripts/benchmarks/bench_parallel.py same --parallel data,latents --mesh 2,2
    python scripts/benchmarks/bench_parallel.py exchange
    python scripts/benchmarks/bench_parallel.py plan

`same` trains each of CASES on the demo model under torchrun (gloo, one thread a process), and compares the log of each
step with that of one process. `exchange` sums gradients of W_dec over two processes as a whole, or only the rows of the
latents that were active. `plan` trains each of PLANNED in one process and in two, for fewer and for more steps, and
compares what a process receives in a step, by its own TCP sockets, its time and its peak memory with what
`sae-training plan` says, given the rates of one process and of the link.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
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

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import model_of
from sae_training.language_model.sites import merged
from sae_training.lm_runner import find_singles, language_model_sae_runner
from sae_training.machine.interrupt import without_traceback
from sae_training.machine.run_files import METRICS_FILE
from sae_training.parallel.ranks import is_first, joined, of_all
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import SAETrainer

CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "l1_coefficient": 1e-3},
    "standard, ghost gradients": {
        "architecture": "standard", "l1_coefficient": 1e-3, "lr": 1e-3, "use_ghost_grads": True,
        "dead_feature_window": 3,
    },
    "standard, resampling": {
        "architecture": "standard", "l1_coefficient": 0.1, "lr": 1e-3, "feature_sampling_method": "anthropic",
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
PLANNED: dict[str, dict[str, Any]] = {
    "data, topk": {"parallel": "data", "architecture": "topk", "expansion_factor": 64},
    "data, topk, wide": {"parallel": "data", "architecture": "topk", "expansion_factor": 256},
    "data, batchtopk": {"parallel": "data", "architecture": "batchtopk", "expansion_factor": 64},
    "data, batchtopk, no BOS": {
        "parallel": "data", "architecture": "batchtopk", "expansion_factor": 64, "exclude_special_tokens": True,
    },
    "data, standard": {"parallel": "data", "architecture": "standard", "expansion_factor": 16, "l1_coefficient": 1e-3},
    "data, two layers": {
        "parallel": "data", "architecture": "topk", "expansion_factor": 64,
        "hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 2],
    },
    "latents, topk": {"parallel": "latents", "architecture": "topk", "expansion_factor": 256},
    "layers, topk": {
        "parallel": "layers", "architecture": "topk", "expansion_factor": 64,
        "hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 2, 4],
    },
    "layers, standard": {
        "parallel": "layers", "architecture": "standard", "expansion_factor": 16, "l1_coefficient": 1e-3,
        "hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 2],
    },
}  # fmt: skip
OF_PLANNED: dict[str, Any] = {
    "train_batch_size": 2048, "store_batch_size": 16, "context_size": 128, "n_batches_in_buffer": 8,
    "wandb_log_frequency": 10, "auxk_coefficient": 0.0, "k": 32, "device": "cpu", "exclude_special_tokens": False,
}  # fmt: skip
RECEIVED = slice(128, 136)
"""Where Linux's `struct tcp_info` has tcpi_bytes_received: of a connection, without headers and repetitions."""

FIRST_STEPS = 20
LOSSES = ("losses/mse_loss", "losses/l1_loss", "losses/ghost_grad_loss", "losses/overall_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    same = verbs.add_parser("same")
    same.add_argument("--parallel", default="data")
    same.add_argument("--mesh", type=lambda text: [int(n) for n in text.split(",")], default=[])
    same.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    same.add_argument("--dtype", default="float64")
    same.add_argument("--steps", type=int, default=200)
    same.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    exchange = verbs.add_parser("exchange")
    exchange.add_argument("--d", type=int, default=512)
    plan = verbs.add_parser("plan")
    plan.add_argument("--steps", type=int, nargs=2, default=[16, 48])
    plan.add_argument("--cases", nargs="+", default=list(PLANNED), choices=PLANNED)
    worker = verbs.add_parser("worker")
    worker.add_argument("what")
    worker.add_argument("request")
    given = parser.parse_args()
    if given.verb == "worker":
        workers = {
            "train": train_all,
            "exchange": time_exchanges,
            "measured": measured,
            "rates": rates,
            "link": link,
        }
        workers[given.what](json.loads(given.request))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        match given.verb:
            case "same":
                found = compare(given, folder)
            case "plan":
                found = {case: against_plan(PLANNED[case], given.steps, folder / case) for case in given.cases}
            case _:
                found = exchanges(given.d)
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
    given.ranks = [math.prod(given.mesh)] if given.mesh else given.ranks
    for n in (1, *given.ranks):
        fields = {"dtype": given.dtype, "parallel": given.parallel, "mesh": given.mesh, "run_dir": str(folder / str(n))}
        fields |= {"total_training_tokens": given.steps * BASE["train_batch_size"]}
        torchrun(n, "train", {"cases": given.cases, "fields": fields})
    return {
        case: {
            f"{n} processes": difference(rows(folder / str(n) / case), rows(folder / "1" / case)) for n in given.ranks
        }
        for case in given.cases
    }


def train_all(request: dict[str, Any]) -> None:
    for case in request["cases"]:
        fields = {**BASE, **request["fields"], "run_name": case, **CASES[case]}
        language_model_sae_runner(LanguageModelSAERunnerConfig(**fields))


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


# ----------------------------------------------------------------------------------------------------- against the plan


def against_plan(changes: dict[str, Any], steps: list[int], folder: Path) -> dict[str, Any]:
    """Return bytes and seconds of a step and peak memory, as planned and as measured of the process with the most."""
    fields = {**BASE, **OF_PLANNED, **changes, "run_dir": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    runs = {n: runs_of(n, fields, steps, folder) for n in (1, 2)}
    per_step = {
        name: [(b - a) / (steps[1] - steps[0]) for a, b in zip(*(of[name] for of in runs[2]), strict=True)]
        for name in ("received", "seconds")
    }
    alone = (runs[1][1]["seconds"][0] - runs[1][0]["seconds"][0]) / (steps[1] - steps[0])
    rates = asked(1, "rates", fields, folder) | asked(2, "link", fields, folder)
    way = planned_way(changes["parallel"], fields, rates, folder)
    planned = {
        "bytes": sum(way["bytes_received_per_step"].values()), "peak": way["memory"]["peak"],
        "seconds": fields["train_batch_size"] / way["tokens_per_s"],
    }  # fmt: skip
    measured = {
        "bytes": max(per_step["received"]), "peak": max(runs[2][1]["peak"]), "seconds": max(per_step["seconds"]),
    }  # fmt: skip
    off = {f"{name} off by": round(measured[name] / planned[name] - 1, 4) for name in planned}
    one = {"one process": {"seconds": alone, "peak": runs[1][1]["peak"][0]}}
    parts = {"of bytes": way["bytes_received_per_step"], "of memory": way["memory"], "rates": rates}
    return {"planned": planned, "measured": measured, **one, **off, "bytes of each": per_step["received"], **parts}


def runs_of(n: int, fields: dict[str, Any], steps: list[int], folder: Path) -> list[dict[str, Any]]:
    """Return what is measured of a run of `n` processes with fewer steps, and of one with more."""
    found = []
    for of_run in steps:
        changes = {"total_training_tokens": of_run * fields["train_batch_size"], "run_name": f"{n} x {of_run}"}
        found.append(asked(n, "measured", fields | changes, folder))
    return found


def asked(n: int, what: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the first of `n` workers writes."""
    out = folder / f"{what}.json"
    torchrun(n, what, {"fields": fields, "out": str(out)})
    return json.loads(out.read_text(encoding="utf-8"))


def planned_way(parallel: str, fields: dict[str, Any], rates: dict[str, float], folder: Path) -> dict[str, Any]:
    """Return what `sae-training plan` says of two processes, given the rates of one and of their link."""
    config = folder / "config.json"
    config.write_text(json.dumps(fields), encoding="utf-8")
    given = ["--lm_rate", rates["lm"], "--step_rate", rates["step"], "--interconnect", rates["link"] / 1e9]
    said = subprocess.run(
        [sys.executable, "-m", "sae_training", "plan", str(config), "--gpus", "2", "--json", "--efficiency", "1"]
        + [str(word) for word in given],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return next(way for way in json.loads(said.stdout)["ways"] if way["parallel"] == parallel)


def rates(request: dict[str, Any]) -> None:
    """Write the tokens/s of the language model's passes, and the rows/s of a step of all autoencoders, alone."""
    cfg = LanguageModelSAERunnerConfig(**request["fields"])
    model = model_of(cfg)
    singles = find_singles(cfg, model)
    store = ActivationsStore(next(iter(singles.values()))[0], model, sites=merged(at for _, at in singles.values()))
    assert isinstance(store.source, ShuffleBuffer)
    next_rows, per_pass = store.source.passes.next_rows, cfg.store_batch_size * cfg.context_size
    seconds = 0.0
    for single, sites in singles.values():
        trainer, times = SAETrainer(SparseAutoencoder(single), single), []
        x = store.sample(cfg.train_batch_size, sites).x
        for step in range(7):
            start = time.perf_counter()
            trainer.step(x, step)
            times.append(time.perf_counter() - start)
        seconds += statistics.median(times)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        next_rows()
        times.append(time.perf_counter() - start)
    found = {"lm": per_pass / statistics.median(times), "step": cfg.train_batch_size / seconds}
    Path(request["out"]).write_text(json.dumps(found), encoding="utf-8")


def link(request: dict[str, Any]) -> None:
    """Write the bytes/s that each of two processes receives while they add 32 MB, of which each receives as much."""
    dist.init_process_group("gloo")
    gradient, times = torch.randn(8 * 2**20), []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradient)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        found = {"link": gradient.nbytes / statistics.median(times)}
        Path(request["out"]).write_text(json.dumps(found), encoding="utf-8")


def measured(request: dict[str, Any]) -> None:
    """Train, and let the first process write what each has received, the time it took, and the most memory it held."""
    cfg = LanguageModelSAERunnerConfig(**request["fields"])
    with joined(cfg):
        start = time.perf_counter()
        language_model_sae_runner(cfg)
        seconds = time.perf_counter() - start
        found = {"received": of_all(bytes_received()), "peak": of_all(peak_memory()), "seconds": of_all(seconds)}
        if is_first():
            Path(request["out"]).write_text(json.dumps(found), encoding="utf-8")


def bytes_received() -> int:
    """Return the bytes that this process has received over the TCP connections that it has now."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(fd)))
        except OSError:  # closed by now, or no socket
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RECEIVED.stop)
                total += int.from_bytes(info[RECEIVED], sys.byteorder)
    return total


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    with without_traceback():
        main()
