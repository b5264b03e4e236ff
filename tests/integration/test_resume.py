"""Stopped and killed runs, continued: real processes, real signals, the uninterrupted run's weights bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Command
from small import SMALL_RUN

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_to_dict
from sae_training.lm_runner import resume_run, run_config
from sae_training.run.checkpoint import complete_checkpoints

Process = Command | subprocess.Popen[str]

N_KILLS = 10
# 160 steps on a text of less than that: kills fall into refills, epochs, checkpoints and evaluations.
LONG_RUN: dict[str, Any] = {
    **SMALL_RUN,
    "architecture": "topk",
    "k": 8,
    "auxk_coefficient": 1 / 32,
    "dead_feature_window": 1,
    "total_training_tokens": 160 * 64,
    "checkpoint_every_steps": 3,
    "n_checkpoints": 1,
    "eval_every_steps": 25,
    "exclude_special_tokens": True,
}
WORDS = ("the", "whale", "ship", "captain", "sea", "storm", "of", "a", "harpoon", "under", "sails", "at", "dawn")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 7,000 tokens, so that the run starts them again."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    shuffle = random.Random(0)
    lines = [json.dumps({"text": " ".join(shuffle.choices(WORDS, k=90))}) for _ in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(text: Path, run_dir: Path, **changes: Any) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        **{**LONG_RUN, "dataset_path": str(text), "run_dir": str(run_dir), "run_name": "run", **changes}
    )


def start(cfg: LanguageModelSAERunnerConfig, folder: Path) -> Command:
    """The run in a process of its own, by the command line."""
    file = folder / "config.json"
    file.write_text(json.dumps(config_to_dict(cfg)))
    return Command(folder, "train", "--config", str(file))


def one_thread_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def step_of(run: Path, process: Process) -> int:
    """The last step that this process has written to status.json; -1 while it has not."""
    try:
        status = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return -1
    return status["step"] if status["pid"] == process.pid else -1


def wait_for(condition: Callable[[], bool], process: Process) -> bool:
    """Wait until `condition` holds (True) or the process ends (False)."""
    deadline = time.monotonic() + 180
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)
    return True


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by the command line as a user starts it, in a Python of its own."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "config.json"
    file.write_text(json.dumps(config_to_dict(config(text, folder))))
    command = [sys.executable, "-m", "sae_training", "train", "--config", str(file)]
    subprocess.run(command, env=one_thread_environment(), timeout=300, check=True)
    return folder / "run"


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("sae.safetensors", "log_feature_sparsity.safetensors", "evaluation.json"):
        assert (one / "final" / name).read_bytes() == (other / "final" / name).read_bytes(), name
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    (snapshot,) = (one / "snapshots").iterdir()
    for file in snapshot.glob("*.safetensors"):
        assert file.read_bytes() == (other / "snapshots" / snapshot.name / file.name).read_bytes()


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(text: Path, tmp_path: Path, uninterrupted: Path) -> None:
    cfg, run = config(text, tmp_path / "killed"), tmp_path / "killed" / "run"
    (tmp_path / "killed").mkdir()
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    killed_at: list[int] = []
    while True:
        process = start(cfg, tmp_path)
        if len(killed_at) < N_KILLS:
            wait_for(lambda process=process: step_of(run, process) >= 0, process)
            # On average 10 steps further than where it began: ten kills end well before step 160.
            wanted = step_of(run, process) + moments.randint(0, 20)
            wait_for(lambda process=process, wanted=wanted: step_of(run, process) >= wanted, process)
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        killed_at.append(step_of(run, process))
    assert len(killed_at) == N_KILLS, f"seed {seed}: the run ended after kills at {killed_at}"
    assert_same_run(uninterrupted, run)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, exit_code: int, text: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    cfg, run = config(text, tmp_path / "stopped", checkpoint_every_steps=None), tmp_path / "stopped" / "run"
    process = start(cfg, tmp_path)
    assert wait_for(lambda: step_of(run, process) >= 20, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == exit_code, err
    assert "Traceback" not in err
    assert f"{number.name}: finishing this step" in out
    assert f"python -m sae_training resume {run}" in err
    (saved,) = complete_checkpoints(run / "checkpoints")
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"

    resumed = Command(tmp_path, "resume", str(run))
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert f"after step {saved.name.removeprefix('step_')}" in out
    assert_same_run(uninterrupted, run)


def test_second_signal_stops_at_once(text: Path, tmp_path: Path) -> None:
    # A step of this size takes seconds and a checkpoint more: neither ends between two signals 50 ms apart.
    cfg = config(
        text,
        tmp_path,
        train_batch_size=8192,
        n_batches_in_buffer=260,
        expansion_factor=64,
        k=64,
        total_training_tokens=10**6,
    )
    run = tmp_path / "run"
    process = start(cfg, tmp_path)
    assert wait_for(lambda: step_of(run, process) >= 0, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert not complete_checkpoints(run / "checkpoints")


@pytest.mark.parametrize("kind", ["standard", "ghost", "topk", "transcoder"])
def test_every_kind_of_run_resumes_exactly(kind: str, text: Path, tmp_path: Path, demo_model: Any) -> None:
    changes: dict[str, Any] = {
        "standard": {"architecture": "standard", "auxk_coefficient": 0.0, "l1_warm_up_steps": 20},
        "ghost": {"architecture": "standard", "auxk_coefficient": 0.0, "use_ghost_grads": True, "l1_coefficient": 0.1},
        "topk": {"lr_scheduler_name": "cosineannealingwarmup"},
        "transcoder": {"hook_point": "blocks.1.hook_resid_mid", "target_hook_point": "blocks.1.hook_mlp_out"}
        | {"normalize_activations": "expected_average_only_in", "optimizer": "adam8bit"},
    }[kind]
    changes |= {"total_training_tokens": 40 * 64, "keep_checkpoints": 100, "feature_sampling_window": 7}
    whole = run_config(config(text, tmp_path / "whole", **changes), demo_model).folder.path
    # A run that was killed after the checkpoint of step 21 is that run's folder without what came later.
    cfg = config(text, tmp_path / "cut", **changes)
    cut = run_config(cfg, demo_model).folder.path
    shutil.rmtree(cut / "final")
    for later in complete_checkpoints(cut / "checkpoints"):
        if int(later.name.removeprefix("step_")) > 21:
            shutil.rmtree(later)
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 39, "torn')
    run_config(cfg, demo_model)
    assert_same_run(whole, cut)


def test_resume_of_a_finished_run_says_where_it_is(small_config: Callable, demo_model: Any) -> None:
    folder = run_config(small_config(), demo_model).folder.path
    with pytest.raises(ValueError, match="this run is finished"):
        resume_run(folder)


def test_kill_before_the_first_checkpoint_starts_again_from_the_beginning(
    text: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    cfg, run = config(text, tmp_path / "early"), tmp_path / "early" / "run"
    process = start(cfg, tmp_path)
    assert wait_for(lambda: step_of(run, process) >= 0, process)
    process.kill()
    process.communicate()
    process = start(cfg, tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_same_run(uninterrupted, run)


def test_a_checkpoint_of_another_run_is_told(small_config: Any, demo_model: Any, tmp_path: Path) -> None:
    def checkpoint_of(seed: int) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sae_training.lm_runner.finish", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_config(small_config(run_name=str(seed), seed=seed, checkpoint_every_steps=4), demo_model)
        return tmp_path / "runs" / str(seed) / "checkpoints"

    one, other = checkpoint_of(1), checkpoint_of(2)
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(
        ValueError, match=r"is a checkpoint of another run; move it away.\n  seed: 2 there, 1 in this run"
    ):
        resume_run(one.parent)


def interrupt(run: Any) -> None:
    raise KeyboardInterrupt
