"""Autoencoders dealt out to two processes: `--parallel layers` beside sparsify's `distribute_modules`. Prints JSON.

    python scripts/benchmarks/bench_distribute.py --python SPARSIFY_VENV/bin/python [--repeats 3]

Both train a topk autoencoder for each of two layers of the demo model on the same token ids, with Adam, in float32, by
gloo on one thread a process. Each trains twice, on fewer and on more of them; the difference is timed, so that what
comes before the first step drops out. Rounds are interleaved.
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

from datasets import Dataset, load_from_disk
from machine import ROOT, machine_facts

from sae_training.demo_data import bundled_model
from sae_training.machine.interrupt import without_traceback

CONTEXT, SEQUENCES, LAYERS, K = 128, 16, (1, 3), 32
ROWS = CONTEXT * SEQUENCES
STEPS = (20, 150)
LAUNCHED = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="that of an environment with eai-sparsify")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--expansion_factors", type=int, nargs="+", default=[8, 64])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = folder / "ids"
        timed([sys.executable, "-m", "sae_training", "pretokenize", "demo", "demo", str(folder / "documents")], folder)
        write_contexts(folder / "documents", ids)
        found = {factor: compared(factor, given, ids, folder) for factor in given.expansion_factors}
    print(json.dumps(machine_facts() | {"arguments": vars(given), "found": found}, indent=2))


def write_contexts(documents: Path, out: Path) -> None:
    """Write the documents' token ids, one after the other, cut into contexts: more than the most steps take."""
    rows: Any = load_from_disk(str(documents))
    ids = [token for document in rows["tokens"] for token in document]
    n = (STEPS[1] + 8) * SEQUENCES
    contexts = [ids[i * CONTEXT : (i + 1) * CONTEXT] for i in range(n)]
    if len(contexts[-1]) < CONTEXT:
        raise SystemExit(f"found {len(ids)} tokens, expected {n * CONTEXT}; lower STEPS")
    Dataset.from_dict({"input_ids": contexts}).save_to_disk(str(out))


def compared(factor: int, given: argparse.Namespace, ids: Path, folder: Path) -> dict[str, object]:
    """Return the tokens/s of both in each round, and the ratio of the medians."""
    ways = {
        "ours": lambda steps: [sys.executable, *LAUNCHED, *ours(factor, steps, ids, folder)],
        "sparsify": lambda steps: [given.python, *LAUNCHED, *theirs(factor, steps, ids, folder)],
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, command in ways.items():
            fewer, more = (timed(command(steps), folder) for steps in STEPS)
            rates[name].append(round(ROWS * (STEPS[1] - STEPS[0]) / (more - fewer), 1))
    medians = {name: statistics.median(of_way) for name, of_way in rates.items()}
    return {
        "d_sae": 192 * factor,
        "tokens/s": rates,
        "ours / sparsify": round(medians["ours"] / medians["sparsify"], 2),
    }


def ours(factor: int, steps: int, ids: Path, folder: Path) -> list[str]:
    fields = {
        "hook_point": "blocks.{layer}.hook_resid_post", "layers": ",".join(map(str, LAYERS)), "parallel": "layers",
        "architecture": "topk", "k": K, "expansion_factor": factor, "lr": 1e-3, "auxk_coefficient": 0,
        "total_training_tokens": steps * ROWS, "train_batch_size": ROWS, "context_size": CONTEXT,
        "store_batch_size": SEQUENCES, "n_batches_in_buffer": 4, "n_eval_batches": 1, "eval_every_steps": 0,
        "lm_dtype": "float32", "encoder_matmul_dtype": "float32", "exclude_special_tokens": False,
        "log_to_wandb": False, "resume": "never", "run_dir": folder / "ours",
    }  # fmt: skip
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["-m", "sae_training", "train", "demo", str(ids), *words]


def theirs(factor: int, steps: int, ids: Path, folder: Path) -> list[str]:
    request = {
        "model": bundled_model("demo"), "ids": str(ids), "hookpoints": [f"layers.{layer}" for layer in LAYERS],
        "expansion_factor": factor, "k": K, "sequences": SEQUENCES, "steps": steps, "out": str(folder / "theirs"),
    }  # fmt: skip
    return [str(Path(__file__).with_name("bench_distribute_peer.py")), json.dumps(request)]


def timed(command: list[str], folder: Path) -> float:
    """Return the seconds of a command, which has to end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stdout + process.stderr)
    return time.perf_counter() - start


if __name__ == "__main__":
    with without_traceback():
        main()
