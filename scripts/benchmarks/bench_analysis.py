"""Times an analysis against the bare pass of its language model, and prints build time, size and memory as JSON.

    python scripts/benchmarks/bench_analysis.py --run RUN [--tokens 500000] [--repeats 3]
    ... --d_sae 36864         the same place in the model with a random autoencoder of so many latents (memory)

Bare pass and build are interleaved, each in a process of its own that has loaded everything; the pass stops after the
hook, over the same contexts. Times are from the first context to the last row of the store.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sae_training.machine.interrupt import without_traceback
from scripts.benchmarks.machine import machine_facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--d_sae", type=int, help="of a random autoencoder in place of the run's")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_analysis"))
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "build": []}
    for _ in range(args.repeats):
        for name in found:
            found[name].append(in_a_process(name, args))
    seconds = {name: statistics.median(each["seconds"] for each in runs) for name, runs in found.items()}
    figures = {
        "tokens": args.tokens,
        "bare_tokens_per_s": round(args.tokens / seconds["bare"]),
        "build_tokens_per_s": round(args.tokens / seconds["build"]),
        "build_over_bare": round(seconds["build"] / seconds["bare"], 3),
        "seconds": {name: [round(each["seconds"], 2) for each in runs] for name, runs in found.items()},
        **{name: found["build"][-1][name] for name in ("d_sae", "store_mb", "peak_gib")},
        "bare_peak_gib": found["bare"][-1]["peak_gib"],
        **machine_facts(),
    }
    print(json.dumps(figures))


def in_a_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, args, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def measure(name: str, args: argparse.Namespace, sender: Any) -> None:
    """Send the seconds and the peak memory of a bare pass or a build."""
    from sae_analysis.build import build_analysis
    from sae_analysis.corpus import LiveCorpus
    from sae_training.sparse_autoencoder import SparseAutoencoder
    from sae_training.utils import LMSparseAutoencoderSessionloader

    model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(args.run)
    if args.d_sae is not None:
        sae = SparseAutoencoder(dataclasses.replace(sae.cfg, expansion_factor=args.d_sae // sae.d_in)).eval()
    n_contexts = -(-args.tokens // sae.cfg.context_size)
    for _ in LiveCorpus(store, store.sites.all, 8):  # warm
        pass
    found: dict[str, Any] = {"d_sae": sae.d_sae, "threads": torch.get_num_threads()}
    if name == "bare":
        begin = time.perf_counter()
        for _ in LiveCorpus(store, store.sites.all, n_contexts):
            pass
    else:
        shutil.rmtree(args.work, ignore_errors=True)
        begin = time.perf_counter()
        build_analysis((model, sae, store), args.tokens, output=args.work)
        found["store_mb"] = round((args.work / "analysis" / "analysis.sqlite").stat().st_size / 1e6, 1)
    found["seconds"] = time.perf_counter() - begin
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    sender.send(found)


if __name__ == "__main__":
    with without_traceback():
        main()
