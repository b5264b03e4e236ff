"""Measures what many autoencoders from one pass of the language model cost, and what training from a cache costs.

    python scripts/benchmarks/bench_scale.py layers      all layers of SmolLM2-135M at once, d_sae 4 x d_in, TopK
    python scripts/benchmarks/bench_scale.py layers --hook hook_mlp_out                    inside each block
    python scripts/benchmarks/bench_scale.py sweep       four l1_coefficient x two lr in one run, against eight runs
    python scripts/benchmarks/bench_scale.py cache       rates, bytes and explained variance of each precision

`layers` divides the time of the whole run by the time that the language model's bare forward and the steps take in it,
and the run's peak memory by the planned one. `sweep` times one run of eight autoencoders and runs of a single one (two
of the eight), in turn. `cache` compares writing with harvesting alone, and reading with the steps that consume rows;
explained variance is that of held-out text after training from each cache, for each of three seeds. JSON on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from sae_training.activations_store import ActivationsStore, passes
from sae_training.activations_store.cache import DTYPES, read_manifest
from sae_training.activations_store.cache_reader import CachedReader, CachedShards
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model
from sae_training.language_model.sites import find_sites, merged, with_widths
from sae_training.lm_runner import find_singles, run_config
from sae_training.machine.interrupt import without_traceback
from sae_training.run.memory_plan import plan_memory
from sae_training.training.trainer import SAETrainer
from scripts.benchmarks.bench_loop import batches_in_memory, time_run, time_steps
from scripts.benchmarks.bench_workers import peak_mib
from scripts.benchmarks.machine import machine_facts
from scripts.demo import smollm2_config

SEEDS = (42, 43, 44)  # of the autoencoders whose explained variance is compared
QUIET: dict[str, Any] = {"log_to_wandb": False, "eval_every_steps": 0, "checkpoint_every_minutes": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "sweep", "cache"))
    parser.add_argument("--tokens", type=int, default=131_072, help="training tokens of each run")
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed several times")
    parser.add_argument("--hook", default="hook_resid_post", help="that `layers` reads in each block")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of caches")
    arguments = parser.parse_args()
    cfg = dataclasses.replace(smollm2_config(arguments.tokens), d_in=None, **QUIET)
    model = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON
        match arguments.what:
            case "layers":
                measured = layers(cfg, model, arguments.hook, arguments.rounds)
            case "sweep":
                measured = sweep(cfg, model, arguments.rounds)
            case _:
                measured = cache(cfg, model, arguments.rounds, arguments.dtypes)
    facts = machine_facts() | {"threads": torch.get_num_threads(), "tokens": arguments.tokens}
    print(json.dumps(facts | measured, indent=2))


# ------------------------------------------------------------------------------------------------------------- layers


def layers(cfg: LanguageModelSAERunnerConfig, model: Any, hook: str, rounds: int) -> dict[str, Any]:
    n = model.cfg.n_layers
    several = dataclasses.replace(
        cfg,
        hook_point="blocks.{layer}." + hook,
        hook_point_layer=list(range(n)),
        expansion_factor=4,
        n_batches_in_buffer=16,
    )
    singles = find_singles(several, model)
    sites = merged(sites for _, sites in singles.values())
    single = next(iter(singles.values()))[0]
    store = ActivationsStore(single, model, sites=sites)
    plan = plan_memory(several, [one for one, _ in singles.values()], store)
    bare_over_harvest = forward_over_harvest(store, rounds)
    with tempfile.TemporaryDirectory() as folder, inside() as spent:
        start = time.perf_counter()
        run_config(dataclasses.replace(several, run_dir=folder), model)
        whole = time.perf_counter() - start
    peak = peak_mib("cpu") * 2**20
    forward = spent["harvest"] * bare_over_harvest
    return {
        "hook": hook,
        "autoencoders": n,
        "d_sae": single.d_sae,
        "run_s": round(whole, 1),
        "harvest_s": round(spent["harvest"], 1),
        "bare_forward_over_harvest": round(bare_over_harvest, 3),
        "steps_s": round(spent["step"], 1),
        "ratio": round(whole / (forward + spent["step"]), 3),
        "planned_peak_gib": round(plan.peak / 2**30, 3),
        "peak_gib": round(peak / 2**30, 3),
        "peak_over_plan": round(peak / plan.peak, 3),
    }


@contextlib.contextmanager
def inside() -> Iterator[dict[str, float]]:
    """Seconds spent in harvesting and in steps while the context lasts."""
    spent = {"harvest": 0.0, "step": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*values, **named)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    with (
        patch.object(passes, "harvest", timed("harvest", harvest)),
        patch.object(SAETrainer, "step", timed("step", SAETrainer.step)),
    ):
        yield spent


@torch.inference_mode()
def forward_over_harvest(store: ActivationsStore, rounds: int) -> float:
    """Time of the language model's forward without logits, over that of harvesting all of the store's sites."""
    tokens, times = store.get_batch_tokens(), {"forward": [], "harvest": []}
    for _ in range(2 * rounds):
        for name, function in (
            ("forward", lambda: store.model(tokens, stop_at_layer=store.model.cfg.n_layers)),
            ("harvest", lambda: harvest(store.model, tokens, store.sites.all)),
        ):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return statistics.median(times["forward"]) / statistics.median(times["harvest"])


# -------------------------------------------------------------------------------------------------------------- sweep


def sweep(cfg: LanguageModelSAERunnerConfig, model: Any, rounds: int) -> dict[str, Any]:
    single = dataclasses.replace(cfg, architecture="standard", expansion_factor=4, auxk_coefficient=0.0)
    values: dict[str, Any] = {"l1_coefficient": [1e-4, 2e-4, 4e-4, 8e-4], "lr": [5e-4, 1e-3]}
    times: dict[str, list[float]] = {"eight_in_one": [], "one": []}
    for i in range(rounds):
        times["eight_in_one"].append(time_run(dataclasses.replace(single, **values), model))
        for j in range(2):
            alone = {name: some[(i + j) % len(some)] for name, some in values.items()}
            times["one"].append(time_run(dataclasses.replace(single, **alone), model))
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "d_sae": 4 * model.cfg.d_model,
        **{f"{name}_s": round(seconds, 1) for name, seconds in median.items()},
        "ratio_to_eight_runs": round(median["eight_in_one"] / (8 * median["one"]), 3),
        "all_times": {name: [round(value, 1) for value in seconds] for name, seconds in times.items()},
    }


# -------------------------------------------------------------------------------------------------------------- cache


def cache(cfg: LanguageModelSAERunnerConfig, model: Any, rounds: int, dtypes: list[str]) -> dict[str, Any]:
    cfg = with_widths(cfg, find_sites(cfg, model))
    result: dict[str, Any] = {}
    shared = {f.name for f in dataclasses.fields(CacheActivationsRunnerConfig)}
    values = {name: getattr(cfg, name) for name in shared if hasattr(cfg, name) and name != "dtype"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in dtypes:
            result[dtype] = figures_of_cache(cfg, model, folder / dtype, dtype, values, rounds)
        live = dataclasses.replace(cfg, run_dir=name, run_name="live", eval_every_steps=10**6)
        result["live"] = {"explained_variance": held_out_variance(live, model)}
    result["step_rows_per_s"] = round(cfg.total_training_tokens / time_steps(cfg, batches_in_memory(cfg, model)))
    return result


def figures_of_cache(
    cfg: LanguageModelSAERunnerConfig, model: Any, folder: Path, dtype: Any, values: dict[str, Any], rounds: int
) -> dict[str, Any]:
    write, bare = [], []
    for i in range(rounds):
        path = folder / str(i)
        settings = values | {"cached_activations_path": str(path), "dtype": dtype}
        start = time.perf_counter()
        cache_activations_runner(CacheActivationsRunnerConfig(**settings), model)
        write.append(time.perf_counter() - start)
        bare.append(time_harvest(cfg, model))
    manifest = read_manifest(folder / "0")
    shards = CachedShards(folder / "0", manifest, "rows", list(manifest.sites))
    reader = CachedReader(shards, print)
    reader.take(cfg.train_batch_size)  # the hashes are then known
    start = time.perf_counter()
    n = shards.n // cfg.train_batch_size - 1
    for _ in range(n):
        reader.take(cfg.train_batch_size)
    read = n * cfg.train_batch_size / (time.perf_counter() - start)
    train = dataclasses.replace(
        cfg,
        run_dir=str(folder),
        run_name="run",
        eval_every_steps=10**6,
        use_cached_activations=True,
        cached_activations_path=str(folder / "0"),
    )
    return {
        "bytes_per_row": round(sum(shard.bytes for shard in manifest.rows) / shards.n, 1),
        "write_tokens_per_s": round(cfg.total_training_tokens / statistics.median(write)),
        "bare_forward_tokens_per_s": round(cfg.total_training_tokens / statistics.median(bare)),
        "write_over_bare_forward": round(statistics.median(bare) / statistics.median(write), 3),
        "read_rows_per_s": round(read),
        "explained_variance": held_out_variance(train, model),
    }


def time_harvest(cfg: LanguageModelSAERunnerConfig, model: Any) -> float:
    """Return the seconds that harvesting as many tokens as a cache holds takes, from tokens in memory."""
    store = ActivationsStore(cfg, model)
    tokens = store.get_batch_tokens()
    start = time.perf_counter()
    for _ in range(-(-cfg.total_training_tokens // tokens.numel())):
        harvest(model, tokens, store.sites.all)
    return time.perf_counter() - start


def held_out_variance(cfg: LanguageModelSAERunnerConfig, model: Any) -> list[float]:
    """Train one autoencoder for each seed, and return the explained variances of held-out text."""
    found: list[float] = []
    for seed in SEEDS:
        run = run_config(dataclasses.replace(cfg, seed=seed, run_name=f"{cfg.run_name}-{seed}"), model)
        evaluation = json.loads((run.folder.final / "evaluation.json").read_text())
        found.append(round(evaluation["metrics/eval_explained_variance"], 4))
    return found


if __name__ == "__main__":
    with without_traceback("What it has printed is complete; the same command begins anew."):
        main()
