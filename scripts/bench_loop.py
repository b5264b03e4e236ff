"""What the store, the loop, logging and checkpoints add to the language model's forward and the autoencoder's step.

    python scripts/bench_loop.py                        SmolLM2-135M, TopK, as `make demo-smollm2`
    python scripts/bench_loop.py --model demo --dataset demo --hook blocks.2.hook_resid_post

A whole run (`language_model_sae_runner`) is timed against its two parts alone: the harvesting forward on batches of the
same size, and the trainer's step on a batch in memory. The three alternate, rounds times, in one process; the figures
are medians, printed as JSON. `ratio` is (whole run) / (forward + step) for the same rows and steps. The whole run has
checkpoints every 50 steps and one evaluation of one batch at its end; `ratio_with_evals` is for a run that evaluates
as often, and on as many tokens, as it does by default.
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
from collections.abc import Callable
from typing import Any

import torch
from demo import smollm2_config

from sae_training.activations import harvest
from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model import find_hook_site, load_language_model
from sae_training.lm_runner import language_model_sae_runner
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.trainer import SAETrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of SmolLM2-135M")
    parser.add_argument("--dataset", help="instead of State of the Union addresses")
    parser.add_argument("--hook", help="instead of blocks.8.hook_resid_post")
    parser.add_argument("--tokens", type=int, default=120_000, help="training tokens of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-evals", action="store_true", help="leave the run with default evaluations out")
    arguments = parser.parse_args()

    cfg = bench_config(arguments)
    model = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype)
    cfg = dataclasses.replace(cfg, d_in=find_hook_site(model, cfg.resolved_hook_point).d_in)
    with_evals = dataclasses.replace(cfg, eval_every_steps=None, n_eval_batches=10)
    timers: dict[str, Callable[[], float]] = {
        "forward_s": lambda: time_forward(cfg, model),
        "step_s": lambda: time_steps(cfg, model),
        "run_s": lambda: time_run(cfg, model),
        "run_with_evals_s": lambda: time_run(with_evals, model),
    }
    if arguments.without_evals:
        del timers["run_with_evals_s"]
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(arguments.rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    print(json.dumps(result(cfg, times), indent=2))


def bench_config(arguments: argparse.Namespace) -> LanguageModelSAERunnerConfig:
    cfg = smollm2_config(arguments.tokens) if arguments.model is None else LanguageModelSAERunnerConfig()
    changes: dict[str, Any] = {
        "model_name": arguments.model,
        "dataset_path": arguments.dataset,
        "hook_point": arguments.hook,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    # Whole steps, and no evaluation but the last, which has its own column; checkpoints as often as by default or
    # oftener.
    return dataclasses.replace(
        cfg,
        **changes,
        d_in=None,
        architecture="topk",
        total_training_tokens=arguments.tokens,
        log_to_wandb=False,
        n_eval_batches=1,
        eval_every_steps=10**6,
        checkpoint_every_steps=50,
    )


def rows_harvested(cfg: LanguageModelSAERunnerConfig) -> int:
    """Rows that a run of this config takes from the language model: the first filling of the buffer, and its
    refills.
    """
    half = cfg.buffer_rows // 2
    per_refill = half // cfg.train_batch_size
    refills = (cfg.total_training_steps - 1) // per_refill
    return cfg.buffer_rows + refills * per_refill * cfg.train_batch_size


@torch.no_grad()
def time_forward(cfg: LanguageModelSAERunnerConfig, model: Any) -> float:
    """Seconds to harvest as many rows as the run does, from tokens in memory."""
    store = ActivationsStore(cfg, model)
    tokens = store.get_batch_tokens()
    rows_per_batch = int(store.keeps(tokens).sum())
    n_batches = -(-rows_harvested(cfg) // rows_per_batch)
    start = time.perf_counter()
    for _ in range(n_batches):
        harvest(model, tokens, store.sites)
    return time.perf_counter() - start


def time_steps(cfg: LanguageModelSAERunnerConfig, model: Any) -> float:
    """Seconds for all steps of the run, on four batches of real activations in memory."""
    store = ActivationsStore(cfg, model)
    rows = [store.passes.next_rows()[0].to(cfg.dtype)]
    while sum(map(len, rows)) < 4 * cfg.train_batch_size:
        rows.append(store.passes.next_rows()[0].to(cfg.dtype))
    batches = torch.cat(rows).split(cfg.train_batch_size)[:4]
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    trainer.sae.initialize_b_dec(torch.cat(batches), "mean")
    trainer.step(batches[0], 0)
    start = time.perf_counter()
    for step in range(cfg.total_training_steps):
        trainer.step(batches[step % 4], step)
    return time.perf_counter() - start


def time_run(cfg: LanguageModelSAERunnerConfig, model: Any) -> float:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON
        start = time.perf_counter()
        language_model_sae_runner(dataclasses.replace(cfg, run_dir=folder), model)
        return time.perf_counter() - start


def result(cfg: LanguageModelSAERunnerConfig, times: dict[str, list[float]]) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in times.items()}
    floor = median["forward_s"] + median["step_s"]
    # The last buffer is half unread when a run ends: a floor that harvests only what was served is lower.
    served_forward = median["forward_s"] * cfg.total_training_tokens / rows_harvested(cfg)
    return {
        "model": cfg.model_name,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "batch": cfg.train_batch_size,
        "steps": cfg.total_training_steps,
        "rows_harvested": rows_harvested(cfg),
        "threads": torch.get_num_threads(),
        **{name: round(value, 2) for name, value in median.items()},
        "ratio": round(median["run_s"] / floor, 3),
        "ratio_rows_served_only": round(median["run_s"] / (served_forward + median["step_s"]), 3),
        "ratio_with_evals": round(median["run_with_evals_s"] / floor, 3) if "run_with_evals_s" in median else None,
        "all_times": {name: [round(value, 2) for value in values] for name, values in times.items()},
    }


if __name__ == "__main__":
    main()
