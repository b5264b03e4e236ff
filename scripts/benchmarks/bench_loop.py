"""Times the whole live training loop against its floor, and against sae-lens' own runner.

    python scripts/benchmarks/bench_loop.py                        SmolLM2-135M, TopK, as `make demo-smollm2`
    python scripts/benchmarks/bench_loop.py --peer --tokens 240000                    and sae-lens, as it is by default
    python scripts/benchmarks/bench_loop.py --peer default bfloat16 huggingface       and in other precisions
    python scripts/benchmarks/bench_loop.py --model demo --dataset demo --hook blocks.2.hook_resid_post

A whole run (`language_model_sae_runner`, without the loading of the model) is timed against its parts, on as many rows
and steps. Run and parts take turns, --rounds times. The JSON on stdout holds medians of:

    hf_forward_s  the bare transformers model in the same precision, cut after the hook's block, on batches of the same
                  shape: no hooks, no logits, no final norm
    forward_s     our harvesting forward on the same batches
    step_s        the trainer's steps on batches in memory, of the rows that fill the buffer at first
    run_s         the whole run: checkpoints and logging as by default, no evaluation

The floor is hf_forward_s + step_s. `ours_over_floor` is (tokens/s of the run) / (tokens/s of the floor): at most 1. A
run ends with a part of its last buffer unread; the floor of `ours_over_floor_rows_served_only` harvests the served rows
only, and long runs approach it. `ratio` is run_s / (forward_s + step_s): the cost of store, loop, logging and
checkpoints. `ratio_with_evals` (--with-evals) is that of a run with the default evaluations.

--peer trains with sae-lens' LanguageModelSAETrainingRunner on the same text, model, hook, sizes and number of steps, in
a process and an environment of its own (`bench_runner_peer.py`, whose VARIANTS can be named), without loading and after
a short warm-up. All else is that package's default, also its buffer of 20 contexts. Ours holds n_batches_in_buffer *
store_batch_size = 640, so that in short runs ours harvests many more rows (`rows_harvested`); --peer-config
'{"n_batches_in_buffer": 640}' makes them equal. `ours_over_peer` is the ratio of tokens/s of whole runs.
`tokens_per_s_after_first_fill` leaves out the time before the first step, which favours the larger buffer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.demo_data import bundled_text
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model, quiet_loading
from sae_training.language_model.sites import find_hook_site
from sae_training.lm_runner import language_model_sae_runner
from sae_training.machine.interrupt import without_traceback
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import SAETrainer
from scripts.benchmarks.bench_runner_peer import VARIANTS
from scripts.benchmarks.bench_step import Failed, check_peer_pythons, last_lines, peer_pythons, show
from scripts.benchmarks.machine import machine_facts
from scripts.demo import DEMO, smollm2_config

PEER = "sae-lens"
PEER_WORKER = Path(__file__).resolve().with_name("bench_runner_peer.py")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclasses.dataclass(frozen=True)
class RunTimes:
    whole_s: float
    after_first_fill_s: float
    """From the first step on."""


def main(words: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if words is None else words)
    cfg = bench_config(arguments)
    model = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype)
    cfg = dataclasses.replace(cfg, d_in=find_hook_site(model, cfg.resolved_hook_point).d_in)
    with_evals = dataclasses.replace(cfg, eval_every_steps=None, n_eval_batches=10)
    bare, batches = bare_model(cfg, model), batches_in_memory(cfg, model)
    timers: dict[str, Callable[[], float]] = {
        "hf_forward_s": lambda: time_bare_forward(cfg, model, bare),
        "forward_s": lambda: time_forward(cfg, model),
        "step_s": lambda: time_steps(cfg, batches),
    }
    if arguments.with_evals:
        timers["run_with_evals_s"] = lambda: time_run(with_evals, model)
    left_out: dict[str, str] = {}
    wanted = [PEER] if arguments.peer else []
    python = peer_pythons(wanted, arguments.peer_python, left_out).get(PEER)
    variants = list(arguments.peer) if python else []

    times: dict[str, list[float]] = {name: [] for name in timers}
    ours: list[RunTimes] = []
    peers: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for i in range(arguments.rounds):
        for name, timer in timers.items():
            times[name].append(timer())
        ours.append(run_times(cfg, model))
        show([f"round {i + 1}: ours {ours[-1].whole_s:.1f} s"])
        for variant in variants:
            if variant in left_out:
                continue
            try:
                assert python is not None
                peers[variant].append(run_peer(python, peer_request(cfg, model, variant, arguments), arguments))
                show([f"round {i + 1}: {PEER} {variant} {peers[variant][-1]['seconds']:.1f} s"])
            except Failed as error:
                left_out[variant] = str(error)
    show([f"left out: {name}: {reason}" for name, reason in left_out.items()])
    peers = {variant: runs for variant, runs in peers.items() if runs}
    print(json.dumps(result(cfg, model, times, ours, peers) | {"left_out": left_out}, indent=2))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="instead of SmolLM2-135M")
    add("--dataset", help="instead of State of the Union addresses")
    add("--hook", help="instead of blocks.8.hook_resid_post")
    add("--config", type=json.loads, default={}, metavar="JSON", help="further config fields of ours, as a JSON object")
    add("--tokens", type=int, default=120_000, help="training tokens of each run, cut to whole steps")
    add("--rounds", type=int, default=3)
    add("--with-evals", action="store_true", help="also a run with the evaluations that are made by default")
    add("--peer", nargs="*", choices=VARIANTS, metavar="VARIANT", help=f"{PEER} too: {', '.join(VARIANTS)}")
    add("--peer-config", type=json.loads, default={}, metavar="JSON", help="fields of the peer's config")
    add("--peer-python", action="append", default=[], metavar=f"{PEER}=PYTHON", help="interpreter that has the peer")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1:
        parser.error("--rounds: expected at least 1")
    check_peer_pythons(parser, arguments.peer_python)
    if arguments.peer == []:
        arguments.peer = ["default"]
    return arguments


def bench_config(arguments: argparse.Namespace) -> LanguageModelSAERunnerConfig:
    """Return the recipe of the demo without its evaluations."""
    own_model = arguments.model is not None
    cfg = LanguageModelSAERunnerConfig(**DEMO) if own_model else smollm2_config(arguments.tokens)
    changes: dict[str, Any] = {
        "model_name": arguments.model,
        "dataset_path": arguments.dataset,
        "hook_point": arguments.hook,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {"total_training_tokens": arguments.tokens, "n_eval_batches": 0, "eval_every_steps": 0}
    return dataclasses.replace(cfg, **changes | arguments.config)


def rows_harvested(cfg: LanguageModelSAERunnerConfig) -> int:
    """Count the rows that a run of this config takes from the language model.

    They are those of the first filling of the buffer, and of the refills until the rows in it are enough for the rest.
    """
    harvested, served, left = cfg.buffer_rows, 0, trained_tokens(cfg)
    while left > 0:
        if served + left > cfg.buffer_rows and served + cfg.tokens_per_step > cfg.buffer_rows // 2:
            harvested, served = harvested + served, 0
        served, left = served + cfg.tokens_per_step, left - cfg.tokens_per_step
    return harvested


def trained_tokens(cfg: LanguageModelSAERunnerConfig) -> int:
    return cfg.total_training_steps * cfg.tokens_per_step


# -------------------------------------------------------------------------------------------------------------- parts


def bare_model(cfg: LanguageModelSAERunnerConfig, model: Any) -> Any:
    """Load the same weights without hooks: transformers' base model, with the blocks that the hook needs only."""
    site = find_hook_site(model, cfg.resolved_hook_point)
    folder = model.tokenizer.name_or_path
    config = AutoConfig.from_pretrained(folder)
    if site.stop_at_layer is not None:
        config.num_hidden_layers = site.stop_at_layer
    with quiet_loading():  # because transformers warns of the blocks in the file that are not used
        bare = AutoModel.from_pretrained(folder, config=config, dtype=model.cfg.dtype)
    for name in FINAL_NORMS:
        if site.stop_at_layer is not None and hasattr(bare, name):
            setattr(bare, name, torch.nn.Identity())
    return bare.to(cfg.device).eval()


def time_bare_forward(cfg: LanguageModelSAERunnerConfig, model: Any, bare: Any) -> float:
    """`time_forward` of `bare`."""
    with torch.inference_mode():
        return time_harvest_by(cfg, model, lambda tokens, _: bare(input_ids=tokens, use_cache=False))


def time_forward(cfg: LanguageModelSAERunnerConfig, model: Any) -> float:
    """Seconds to harvest as many rows as the run does, from tokens in memory."""
    return time_harvest_by(cfg, model, lambda tokens, sites: harvest(model, tokens, sites))


def time_harvest_by(cfg: LanguageModelSAERunnerConfig, model: Any, forward: Callable[[Tensor, Any], object]) -> float:
    store = ActivationsStore(cfg, model)
    tokens = store.get_batch_tokens()
    rows_per_batch = int(store.keeps(tokens).sum())
    n_batches = -(-rows_harvested(cfg) // rows_per_batch)
    forward(tokens, store.sites.all)
    start = now(cfg)
    for _ in range(n_batches):
        forward(tokens, store.sites.all)
    return now(cfg) - start


def batches_in_memory(cfg: LanguageModelSAERunnerConfig, model: Any) -> list[Tensor]:
    """Return batches of real activations, all different: those of the first filling, or as many as the run needs."""
    n = min(cfg.total_training_steps, cfg.buffer_rows // cfg.train_batch_size)
    return list(ActivationsStore(cfg, model).sample(n * cfg.train_batch_size).x.split(cfg.train_batch_size))


def time_steps(cfg: LanguageModelSAERunnerConfig, batches: list[Tensor]) -> float:
    """Seconds for all steps of the run, on the same batches again and again."""
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    trainer.sae.initialize_b_dec(torch.cat(batches[:4]), "mean")
    trainer.step(batches[0], 0)
    start = now(cfg)
    for step in range(cfg.total_training_steps):
        trainer.step(batches[step % len(batches)], step)
    return now(cfg) - start


def now(cfg: LanguageModelSAERunnerConfig) -> float:
    """Seconds on a clock, with the work of the device done."""
    if str(cfg.device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------------- whole runs


def time_run(cfg: LanguageModelSAERunnerConfig, model: Any) -> float:
    return run_times(cfg, model).whole_s


def run_times(cfg: LanguageModelSAERunnerConfig, model: Any) -> RunTimes:
    first_step: list[float] = []
    step = SAETrainer.step

    def noted(*values: Any, **named: Any) -> Any:
        if not first_step:
            first_step.append(time.perf_counter())
        return step(*values, **named)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),  # stdout is for the JSON
        patch.object(SAETrainer, "step", noted),
    ):
        start = now(cfg)
        language_model_sae_runner(dataclasses.replace(cfg, run_dir=folder), model)
        end = now(cfg)
    return RunTimes(end - start, end - first_step[0])


def peer_request(
    cfg: LanguageModelSAERunnerConfig, model: Any, variant: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    site = find_hook_site(model, cfg.resolved_hook_point)
    if not cfg.resolved_hook_point.endswith("hook_resid_post") or cfg.architecture != "topk":
        raise Failed(f"found {cfg.architecture} at {cfg.resolved_hook_point}, expected topk at a hook_resid_post")
    sizes = {
        "train_batch_size_tokens": cfg.train_batch_size,
        "context_size": cfg.context_size,
        "store_batch_size_prompts": cfg.store_batch_size,
        "device": cfg.device,
    }
    return {
        "model": model.tokenizer.name_or_path,
        "layer": site.layer,
        "dataset": bundled_text(str(cfg.dataset_path)),
        "variant": variant,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "steps": cfg.total_training_steps,
        "config": sizes | arguments.peer_config,
    }


def run_peer(python: str, request: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the answer of `bench_runner_peer.py`; raise Failed if it has none, or did not train as it should."""
    threads = str(torch.get_num_threads())
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
    if not arguments.peer_python:
        env.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [python, str(PEER_WORKER)], input=json.dumps(request), capture_output=True, text=True, env=env
        )
    except OSError as error:
        raise Failed(f"cannot start {PEER}: {error}") from None
    if done.returncode != 0:
        raise Failed(f"its process ended with status {done.returncode}: {last_lines(done.stderr)}")
    reply = json.loads(done.stdout)
    if "error" in reply:
        raise Failed(" ".join(reply["error"].split()))
    if reply["steps"] != request["steps"] or not math.isfinite(reply["last_loss"]):
        raise Failed(f"{reply['steps']} steps of {request['steps']}, last loss {reply['last_loss']}")
    return reply


# ------------------------------------------------------------------------------------------------------------- result


def result(
    cfg: LanguageModelSAERunnerConfig,
    model: Any,
    times: dict[str, list[float]],
    ours: list[RunTimes],
    peers: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    tokens = trained_tokens(cfg)
    times = times | {"run_s": [one.whole_s for one in ours]}
    median = {name: statistics.median(values) for name, values in times.items()}
    run, floor, harvesting = median["run_s"], median["hf_forward_s"] + median["step_s"], median["forward_s"]
    of_parts = harvesting + median["step_s"]
    served = tokens / rows_harvested(cfg)  # a part of the last buffer is unread when a run ends
    after_fill = {"ours": statistics.median(one.after_first_fill_s for one in ours)}
    seconds = {"ours": run, "floor": floor}
    for variant, runs in peers.items():
        seconds[f"{PEER}/{variant}"] = statistics.median(one["seconds"] for one in runs)
        after_fill[f"{PEER}/{variant}"] = statistics.median(one["seconds"] - one["first_step_after_s"] for one in runs)
    return {
        **machine_facts(),
        "threads": torch.get_num_threads(),
        "device": cfg.device,
        "model": cfg.model_name,
        "lm_dtype": str(model.cfg.dtype).removeprefix("torch."),
        "hook_point": cfg.resolved_hook_point,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "batch": cfg.train_batch_size,
        "context_size": cfg.context_size,
        "store_batch_size": cfg.store_batch_size,
        "steps": cfg.total_training_steps,
        "tokens": tokens,
        "rows_harvested": rows_harvested(cfg),
        **{name: round(value, 2) for name, value in median.items()},
        "tokens_per_s": {name: round(tokens / value, 1) for name, value in seconds.items()},
        "tokens_per_s_after_first_fill": {name: round(tokens / value, 1) for name, value in after_fill.items()},
        "ours_over_floor": round(floor / run, 3),
        "ours_over_floor_rows_served_only": round((median["hf_forward_s"] * served + median["step_s"]) / run, 3),
        "ours_over_peer": {name: round(value / run, 2) for name, value in seconds.items() if name.startswith(PEER)},
        "ratio": round(run / of_parts, 3),
        "ratio_rows_served_only": round(run / (harvesting * served + median["step_s"]), 3),
        "ratio_with_evals": round(median["run_with_evals_s"] / of_parts, 3) if "run_with_evals_s" in median else None,
        "all_times": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "peers": {variant: peer_figures(runs) for variant, runs in peers.items()},
    }


def peer_figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    timed = ("seconds", "first_step_after_s", "forward_s", "step_s")
    return runs[-1] | {name: [round(one[name], 2) for one in runs] for name in timed}


if __name__ == "__main__":
    with without_traceback("What it has printed is complete; the same command begins anew."):
        main()
