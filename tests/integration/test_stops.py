"""A stop in each phase of a run, and of a cache: heeded before the next pass, nothing trained is lost, and the run that
goes on ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Command
from small import SMALL_RUN
from stopped import run_stopped

from sae_training import cli
from sae_training.run.checkpoint import complete_checkpoints
from sae_training.run.folder import is_finished

# The same for all stops: a window that ends, an evaluation and a snapshot all follow step 8.
RUN: dict[str, Any] = {
    **SMALL_RUN,
    "architecture": "topk",
    "k": 8,
    "auxk_coefficient": 1 / 32,
    "feature_sampling_method": "anthropic",
    "feature_sampling_window": 4,
    "eval_every_steps": 4,
    "n_checkpoints": 2,
    "ema_decay": 0.5,
    "wandb_mode": "disabled",
}


def arguments(folder: Path, **changes: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    file = folder / "run.json"
    file.write_text(json.dumps({**RUN, "run_dir": str(folder), **changes}))
    return ["train", "--config", str(file)]


def files_of(run: Path) -> dict[str, bytes]:
    """What a run leaves that does not tell the time, nor its own place."""
    names = ("metrics.jsonl", "sae.safetensors", "evaluation.json", "log_feature_sparsity.safetensors")
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.name in names}
    return found | {str(path.relative_to(run)): b"" for path in run.glob("checkpoints/*/*")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = Command(folder, *arguments(folder))
    _, err = process.communicate()
    assert process.returncode == 0, err
    return files_of(folder / "run")


def go_on(run: Path, tmp_path: Path) -> None:
    resumed = Command(tmp_path, "resume", str(run))
    _, err = resumed.communicate()
    assert resumed.returncode == 0, err


@pytest.mark.parametrize(
    ("phase", "n", "step"),
    [
        ("evaluation", 2, 4),
        ("evaluation", 6, 8),
        ("evaluation", 7, 12),  # the last one
        ("evaluation", 9, 12),
        ("refilling the buffer", 2, None),
        ("refilling the buffer", 5, None),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_stop_in_a_phase_costs_nothing_that_was_trained(
    phase: str, n: int, step: int | None, number: signal.Signals, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    code, said, n_after = run_stopped(tmp_path, phase, n, number, *arguments(tmp_path))
    assert (code, n_after) == (128 + number, 0), said
    run = tmp_path / "run"
    assert not is_finished(run)
    saved = complete_checkpoints(run / "checkpoints")[0]
    assert f"Stopped by {number.name} after step {saved.name.removeprefix('step_')} of 12, saved {saved}." in said
    assert step is None or saved.name == f"step_{step}"
    assert f"python -m sae_training resume {run}" in said
    assert "Traceback" not in said
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    go_on(run, tmp_path)
    expected = dict(undisturbed)
    if saved.name != "step_12":  # the checkpoint of a stop in mid-run stays, as the user's own do
        expected |= {str(path.relative_to(run)): b"" for path in saved.iterdir()}
    assert {name: content for name, content in files_of(run).items() if "checkpoints" not in name} == {
        name: content for name, content in expected.items() if "checkpoints" not in name
    }
    assert {name for name in files_of(run) if "checkpoints" in name} == {n for n in expected if "checkpoints" in n}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_in_the_first_fill_leaves_what_the_same_command_begins(
    number: signal.Signals, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    words = arguments(tmp_path)
    code, said, n_after = run_stopped(tmp_path, "filling the buffer", 2, number, *words)
    assert (code, n_after) == (128 + number, 0), said
    assert f"Stopped by {number.name} before a step was made. The same command begins again." in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    process = Command(tmp_path, *words)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert files_of(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("changes", [{}, {"k": [4, 8]}])
def test_stop_in_the_report_leaves_a_finished_run_and_says_what_draws_it(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    code, said, n_after = run_stopped(tmp_path, "report", 1, signal.SIGTERM, *arguments(tmp_path, **changes))
    run = tmp_path / "run"
    assert (code, n_after) == (0, 0), said
    assert is_finished(run)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not (run / "report.html").exists()
    assert f"The run is finished, without report.html, which this draws: python -m sae_training report {run}" in said
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").exists()


def test_stop_in_the_evaluation_of_several_goes_on_with_it(tmp_path: Path) -> None:
    words = arguments(tmp_path, k=[4, 8], eval_every_steps=100)
    code, said, n_after = run_stopped(tmp_path, "evaluation", 3, signal.SIGTERM, *words)
    run = tmp_path / "run"
    assert (code, n_after) == (143, 0), said
    assert "The same command evaluates what is trained, and so does" in said
    process = Command(tmp_path, *words)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"Continuing {run} after step 12." in out
    assert is_finished(run)
    assert not (run / "checkpoints").exists()


def test_stop_while_a_cache_is_checked(tmp_path: Path) -> None:
    values = {"model_name": "demo", "hook_point": RUN["hook_point"], "dataset_path": "demo", "context_size": 16}
    words = [f"--{name}={value}" for name, value in values.items()]
    words = ["cache", *words, "--total_training_tokens=4096", f"--cached_activations_path={tmp_path / 'cache'}"]
    code, said, _ = run_stopped(tmp_path, "passes", 10**6, signal.SIGTERM, *words)
    assert code == 0, said
    code, said, n_after = run_stopped(tmp_path, "checking", 1, signal.SIGTERM, *words)
    assert (code, n_after) == (143, 0), said
    assert f"the same command continues {tmp_path / 'cache'}" in said
