"""Times training beside a wandb that fails in every way, and counts what it holds afterwards.

    python scripts/benchmarks/bench_wandb.py                        the bundled model, 3,000 steps, a row at every tenth
    python scripts/benchmarks/bench_wandb.py --rounds 5 --only off slow killed

The ways take turns, --rounds times; each begins well, and its mood sets in after a third of the steps:

    off, offline            without wandb; with files alone
    well                    against a local server (`wandb_server.py`, a process of its own) that answers
    slow, never             that answers after 2 s, or not at all
    500, 429, 403, reset    with an error, the last but one for ever, or by breaking the connection
    killed, stopped         offline, with SIGKILL or SIGSTOP to wandb's service process

The JSON on stdout holds for each way:

    steps_per_s, over_off   the median, and its ratio to `off`
    largest_log_ms          the longest that training was held up by logging one row, in all rounds
    close_s                 the longest wait for wandb at the end (its bound is --finish-s + 10 s)
    said                    what the user was told in the last round
    in_files, on_server     of the last round: steps that wandb holds, and how many are missing or held twice
    after_sync              the same on a server that answers, after `sae-training sync`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model
from sae_training.lm_runner import run_config
from sae_training.machine.interrupt import without_traceback
from sae_training.run import wandb_run
from sae_training.run.logger import RunLogger
from sae_training.run.wandb_mirror import Steps
from sae_training.run.wandb_sync import sync
from scripts.benchmarks.machine import machine_facts

MOODS = ("slow", "never", "500", "429", "403", "reset")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
WAYS = ("off", "offline", "well", *MOODS, *SIGNALS)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--finish-s", type=float, default=5.0, help="how long wandb may take at the end of a run")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    arguments = parser.parse_args(words)
    model = load_language_model("demo", lm_dtype="float32")
    measured: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.only}
    with tempfile.TemporaryDirectory() as folder, served() as url:
        os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = f"{folder}/home"
        for number in range(arguments.rounds):
            for way in arguments.only:
                cfg = bench_config(arguments, way, f"{folder}/{number}")
                measured[way].append(run_beside(way, cfg, model, url, arguments))
                print(f"round {number + 1}, {way}: {measured[way][-1]}", file=sys.stderr)
    print(json.dumps({"machine": machine_facts(), "ways": summary(measured)}, indent=2))


def bench_config(arguments: argparse.Namespace, way: str, folder: str) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        model_name="demo",
        dataset_path="demo",
        hook_point="blocks.1.hook_resid_post",
        d_in=None,
        lm_dtype="float32",
        context_size=32,
        architecture="topk",
        k=16,
        expansion_factor=2,
        train_batch_size=128,
        total_training_tokens=128 * arguments.steps,
        store_batch_size=8,
        n_batches_in_buffer=16,
        n_eval_batches=1,
        eval_every_steps=0,
        wandb_log_frequency=arguments.log_every,
        lr=1e-3,
        run_dir=folder,
        run_name=way,
        log_to_wandb=way != "off",
        wandb_mode="offline" if way in ("offline", *SIGNALS) else "online",
    )


def run_beside(
    way: str, cfg: LanguageModelSAERunnerConfig, model: Any, url: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train beside a wandb of the kind `way`, and return the figures of one round."""
    delays, closes, said, disturbed = list[float](), list[float](), list[str](), list[int]()
    log, close, write = RunLogger.log, RunLogger.close, tqdm.write
    put(f"{url}/mood/well")

    def timed_log(logger: RunLogger, row: Any, step: int, tokens: int) -> None:
        if 3 * step >= arguments.steps and not disturbed:
            disturbed.append(step)
            disturb(way, url)
        start = time.perf_counter()
        log(logger, row, step, tokens)
        delays.append(time.perf_counter() - start)

    def timed_close(logger: RunLogger, exit_code: int = 0) -> None:
        start = time.perf_counter()
        close(logger, exit_code)
        closes.append(time.perf_counter() - start)

    def heard_write(text: str, *rest: Any, **more: Any) -> None:
        if text.startswith("wandb:"):
            said.append(text)
        write(text, *rest, **(more | {"file": sys.stderr}))

    of_member = wandb_run.WandbOptions.of_member

    def bounded(*given: Any) -> Any:
        return dataclasses.replace(of_member(*given), finish_timeout_s=arguments.finish_s)

    with (
        patch.object(RunLogger, "log", timed_log),
        patch.object(RunLogger, "close", timed_close),
        patch.object(tqdm, "write", heard_write),
        patch.object(wandb_run.WandbOptions, "of_member", bounded),
    ):
        run = run_config(cfg, model)
    assert run.progress.ended is not None
    folder, seconds = run.folder.path, run.progress.ended - run.progress.started
    figures: dict[str, Any] = {
        "steps_per_s": arguments.steps / seconds,
        "largest_log_ms": 1000 * max(delays),
        "close_s": sum(closes),
        "said": said,
    }
    put(f"{url}/mood/well")
    wandb_run.end_service()
    if way != "off":
        expected = [step for step, _ in Steps(folder / "metrics.jsonl").new(is_complete=True)]
        run_id = wandb_run.run_id(folder, is_only_one=True)
        figures["in_files"] = held(expected, list(steps_in_files(folder)))
        figures["on_server"] = held(expected, on_server(url, run_id))
        figures["sync_said"] = list(sync(folder))
        wandb_run.end_service()
        figures["after_sync"] = held(expected, on_server(url, run_id))
    return figures


def disturb(way: str, url: str) -> None:
    if way in MOODS:
        put(f"{url}/mood/{way}")
    elif way in SIGNALS:
        os.kill(service_pid(), SIGNALS[way])


def service_pid() -> int:
    """Return the process id of wandb's service, which the mirror's thread has started by now, or soon will have."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = subprocess.run(["pgrep", "-n", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
        if found.stdout:
            return int(found.stdout)
        time.sleep(0.1)
    raise TimeoutError("found no process wandb-core")


def steps_in_files(folder: Path) -> Iterator[int]:
    """Yield the step of each row in wandb's files, as often as there is one."""
    for file in folder.glob("wandb/*run-*/*.wandb"):
        for record in wandb_run.records(file):
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    if "_step" in (item.key, *item.nested_key):
                        yield json.loads(item.value_json)


def held(expected: list[int], found: list[int]) -> dict[str, int]:
    counts = Counter(found)
    return {
        "rows": len(found),
        "steps": len(counts),
        "missing": sum(step not in counts for step in expected),
        "doubled": sum(count > 1 for count in counts.values()),
    }


def on_server(url: str, run_id: str) -> list[int]:
    with urllib.request.urlopen(f"{url}/steps/{run_id}") as answer:
        return json.load(answer)["steps"]


def put(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()


@contextmanager
def served() -> Iterator[str]:
    """Run the server in a process of its own, because a thread would take the interpreter from training."""
    command = [sys.executable, "-m", "scripts.benchmarks.wandb_server"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    medians = {way: statistics.median(one["steps_per_s"] for one in rounds) for way, rounds in measured.items()}
    return {
        way: rounds[-1]
        | {"steps_per_s": round(medians[way], 2)}
        | ({"over_off": round(medians[way] / medians["off"], 3)} if "off" in medians else {})
        | {name: round(max(one[name] for one in rounds), 1) for name in ("largest_log_ms", "close_s")}
        for way, rounds in measured.items()
    }


if __name__ == "__main__":
    with without_traceback():
        main()
