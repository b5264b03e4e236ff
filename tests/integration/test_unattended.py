"""Runs that nobody looks after: signals that end nothing, a terminal that closes, files that lie elsewhere."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import train
from processes import Command
from small import SMALL_RUN

from sae_training.config.io import config_to_dict
from sae_training.demo_data import DEMO_MODEL
from sae_training.lm_runner import resume_run, run_config
from sae_training.run.checkpoint import complete_checkpoints

# 800 steps of some milliseconds, so that a signal falls into them; nothing is saved that nobody asks for.
UNSAVED: dict[str, Any] = {
    **SMALL_RUN,
    "architecture": "topk",
    "k": 8,
    "total_training_tokens": 800 * 64,
    "checkpoint_every_minutes": None,
    "wandb_log_frequency": 1,
    "eval_every_steps": 0,
    "run_name": "run",
}


def words(folder: Path, **changes: Any) -> list[str]:
    return train(UNSAVED | changes, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = Command(folder, *words(folder))
    assert process.communicate()[1] is not None and process.returncode == 0
    return left_in(folder / "run")


def left_in(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "final/sae.safetensors")}


def step_of(run: Path) -> int:
    try:
        return json.loads((run / "status.json").read_text())["step"]
    except (OSError, ValueError):
        return 0


def wait_until(holds: Callable[[], bool], is_over: Callable[[], bool]) -> None:
    while not holds():
        assert not is_over()
        time.sleep(0.005)


def test_sigusr1_saves_and_goes_on_and_sighup_changes_nothing(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    process, run = Command(tmp_path, *words(tmp_path)), tmp_path / "run"
    wait_until(lambda: step_of(run) > 0, lambda: process.poll() is not None)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: bool(complete_checkpoints(run / "checkpoints")), lambda: process.poll() is not None)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "SIGHUP: the terminal is closed; this goes on without it." in out
    assert "SIGUSR1: saving after this step; this goes on." in out
    assert left_in(run) == undisturbed


def test_after_sigterm_with_too_little_time_the_checkpoint_before_counts(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    changes = {"grace_seconds": 1e-6, "checkpoint_every_minutes": 60}
    process, run = Command(tmp_path, *words(tmp_path, **changes)), tmp_path / "run"
    wait_until(lambda: (run / "checkpoints/step_1/manifest.json").is_file(), lambda: process.poll() is not None)
    wait_until(lambda: step_of(run) > 3, lambda: process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143
    assert "not saved: 0.0 s are left" in err and str(run / "checkpoints" / "step_1") in err
    assert "grace_seconds: a checkpoint takes" in out
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step_1"]
    resume_run(run)
    assert left_in(run) == undisturbed


@pytest.mark.slow
def test_a_run_outlives_its_terminal(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    ours, its = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "sae_training", *words(tmp_path)]
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, start_new_session=True, preexec_fn=take_terminal,
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    os.close(its)
    wait_until(lambda: step_of(tmp_path / "run") > 0, lambda: process.poll() is not None)
    os.close(ours)
    assert process.wait(300) == 0
    log = (tmp_path / "run" / "run.log").read_text()
    assert "the terminal is gone" in log and "SIGHUP: the terminal is closed" in log and "Run folder:" in log
    assert log.count("training:") < 10  # and not as often as a bar is drawn
    assert left_in(tmp_path / "run") == undisturbed


def test_a_run_goes_on_with_a_model_and_a_text_of_other_names(
    small_config: Callable, demo_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("The whale swam by the ship, and the sailors looked at it. " * 2_000)
    other.write_text("Call me what you like, but not before breakfast. " * 2_000)
    cfg = small_config(dataset_path=str(text), run_name="run", checkpoint_every_steps=4)
    expected = config_to_dict(run_config(cfg, demo_model).cfg)

    with monkeypatch.context() as patch:
        patch.setattr("sae_training.lm_runner.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run_config(small_config(**{**vars_of(cfg), "run_name": "moves"}), demo_model)
    run = Path(cfg.resolved_run_dir) / "moves"
    shutil.copytree(DEMO_MODEL, tmp_path / "a model")
    text.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "renamed.txt")
    before = (run / "config.json").read_bytes()
    for changes in ({"dataset_path": str(other)}, {"eval_dataset_path": str(other)}):
        with pytest.raises(ValueError, match="expected .*, as the run has read it"):
            resume_run(run, **{"dataset_path": str(tmp_path / "renamed.txt")} | changes)
    shutil.move(run / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="dataset_path"):  # before there is a checkpoint as well
        resume_run(run, dataset_path=str(other))
    shutil.move(tmp_path / "checkpoints", run / "checkpoints")
    assert (run / "config.json").read_bytes() == before
    resumed = resume_run(run, model_name=str(tmp_path / "a model"), dataset_path=str(tmp_path / "renamed.txt"))
    assert resumed.cfg.model_name == str(tmp_path / "a model")
    assert left_in(run) == left_in(run.with_name("run"))
    assert expected["dataset_path"] == str(text)


def test_a_checkpoint_of_the_last_step_in_the_background_ends_before_the_run(
    small_config: Callable, demo_model: Any, tmp_path: Path
) -> None:
    run_config(small_config(checkpoint_every_steps=4, eval_every_steps=0, run_name="run"), demo_model)
    assert json.loads((tmp_path / "runs" / "run" / "status.json").read_text())["state"] == "finished"


def stop(run: Any) -> None:
    raise KeyboardInterrupt


def vars_of(cfg: Any) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in ("dataset_path", "checkpoint_every_steps")}
