"""Tests, and whole runs, on a device. All but the tests need the package's dependencies (`gpu_check.py --wheels`).

`live` trains on the bundled model as `scripts/demo.py` does. `ahead` trains beside a language model of GPT-2 small's
size with random weights, once with its passes begun ahead of need in a stream of their own (`PassesAhead`) and once
without: the steps and the rows are the same, and so must be the weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from scripts.benchmarks.gpu_parts import Figures, Items, Skip, forget_peak, peak_gib
from scripts.benchmarks.machine import ROOT

KERNEL_TESTS = tuple(
    ROOT / "tests" / "unit" / "kernels" / f"test_triton_{name}.py" for name in ("products", "selection")
)
QUIET: dict[str, Any] = {"log_to_wandb": False, "checkpoint_every_minutes": None}


def items(name: str, device: torch.device) -> Items:
    match name:
        case "tests":
            return {"kernels": partial(kernel_tests, device), "others marked gpu": marked_tests}
        case "live":
            return {"demo": partial(live, device)}
        case _:
            return {"ahead and not, in turn": partial(ahead, device)}


# -------------------------------------------------------------------------------------------------------------- tests


def kernel_tests(device: torch.device) -> Figures:
    """All tests of the kernels that use a GPU where there is one, marked or not; they need torch, triton and pytest."""
    chosen = ("-m", "gpu") if device.type == "cpu" else ("-k", "not interpreter and not without_a_gpu")
    return pytest_figures("--noconftest", *chosen, *map(str, KERNEL_TESTS))


def marked_tests() -> Figures:
    """The tests marked gpu in other files, whose fixtures need the package's dependencies."""
    tests = ROOT / "tests"
    files = [file for file in sorted(tests.rglob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    import transformer_lens  # noqa: F401 - tests/conftest.py loads a model with it; skipped if it is missing

    return pytest_figures("-m", "gpu", *(str(file) for file in files if file not in KERNEL_TESTS))


def pytest_figures(*words: str) -> Figures:
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed; the part `kernels` compares the same products")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    if done.returncode not in (0, 5):  # 5: no test was selected
        raise AssertionError(f"pytest ended with status {done.returncode}: {done.stdout[-1500:]}")
    if not counts.get("passed"):
        raise Skip(f"no test ran: {counts}")
    return counts


# --------------------------------------------------------------------------------------------------------- whole runs


def live(device: torch.device) -> Figures:
    """A run of the demo, with the memory it planned against the memory it took."""
    from scripts.demo import demo_config

    changes: dict[str, Any] = {"device": device.type, **QUIET}
    if device.type == "cpu":
        changes |= {"total_training_tokens": 4_096, "train_batch_size": 256, "n_batches_in_buffer": 2}
        changes |= {"n_eval_batches": 1, "expansion_factor": 2}
    return timed_run(dataclasses.replace(demo_config(), **changes), None, device)


def ahead(device: torch.device) -> Figures:
    """Tokens per second of the same run with and without harvesting ahead, and whether the weights are the same."""
    from sae_training.activations_store.passes import PassesAhead
    from scripts.demo import demo_config

    tiny = device.type == "cpu"
    model = random_language_model(device, *((2, 64) if tiny else (12, 768)))
    changes: dict[str, Any] = {
        "hook_point": "blocks.1.hook_resid_post" if tiny else "blocks.8.hook_resid_post",
        "d_in": None,
        "device": device.type,
        "n_eval_batches": 0,
        "eval_every_steps": 0,
        "expansion_factor": 2 if tiny else 16,
        "total_training_tokens": 2_048 if tiny else 1_000_000,
        "train_batch_size": 128 if tiny else 4_096,
        "n_batches_in_buffer": 2 if tiny else 32,
        **QUIET,
    }
    cfg = dataclasses.replace(demo_config(), **changes)
    figures: Figures = {}
    weights: list[Any] = []
    for way in ("off", "on"):
        begin = PassesAhead.begin if way == "on" else lambda passes, n_rows: None
        with patch.object(PassesAhead, "begin", begin):
            found = timed_run(cfg, model, device, weights)
        figures |= {f"{way}_{name}": found[name] for name in ("tokens_per_s", "peak_gib") if name in found}
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first), "harvesting ahead changes the weights"
    return figures | {"on_over_off": round(figures["on_tokens_per_s"] / figures["off_tokens_per_s"], 3)}


def random_language_model(device: torch.device, n_layers: int, width: int) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from sae_training.language_model.load import load_language_model

    tokenizer = load_language_model("demo", "cpu", "float32").tokenizer
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    sizes: dict[str, Any] = {"n_layers": n_layers, "d_model": width, "d_head": 64, "n_heads": width // 64}
    sizes |= {"n_ctx": 256, "act_fn": "gelu_new", "d_vocab": len(tokenizer), "seed": 0}
    cfg = HookedTransformerConfig(**sizes, device=device.type, dtype=dtype)
    return HookedTransformer(cfg, tokenizer=tokenizer)


def timed_run(cfg: Any, model: Any, device: torch.device, weights: list[Any] | None = None) -> Figures:
    """The figures of one run in a temporary folder; its weights are added to `weights`."""
    from sae_training import lm_runner

    plans: list[Any] = []
    plan_memory = lm_runner.plan_memory

    def noted(*values: Any, **named: Any) -> Any:
        plans.append(plan_memory(*values, **named))
        return plans[-1]

    forget_peak(device)
    with tempfile.TemporaryDirectory() as folder, patch.object(lm_runner, "plan_memory", noted):
        start = time.perf_counter()
        run = lm_runner.run_config(dataclasses.replace(cfg, run_dir=folder), model)
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
        evaluation = Path(run.folder.path, "final", "evaluation.json")
        measured = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
    if weights is not None:
        weights.append({name: value.clone() for name, value in run.sae.weights()})
    rates = [row["details/tokens_per_second"] for row in rows if "details/tokens_per_second" in row]
    figures: Figures = {"steps": run.step, "seconds": round(seconds, 1)}
    figures["tokens_per_s"] = round(max(rates)) if rates else round(run.n_training_tokens / seconds)
    figures |= {
        short: round(measured[name], 4)
        for name, short in (("metrics/eval_explained_variance", "ev"), ("metrics/CE_loss_score", "ce_score"))
        if isinstance(measured.get(name), float)  # words stand in place of a score that means nothing
    }
    if device.type == "cuda":
        figures |= {"peak_gib": peak_gib(device), "planned_gib": round(plans[0].peak / 2**30, 3)}
    return figures
