"""Processes that share the rows of each batch under torchrun: the run of one process, whatever stops them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    all_end_well,
    check_same_run,
    files_of,
    ranks,
    run_by_torchrun,
    stopped_after_a_checkpoint,
    torchrun,
    train,
)
from small import SMALL_RUN

from sae_training import cli

# A choice among all rows, a remedy with rows of its own, resampling, parts of a batch, and an odd number of rows.
RUN: dict[str, Any] = {
    **SMALL_RUN,
    "architecture": "batchtopk",
    "k": 8,
    "auxk_coefficient": 1 / 32,
    "feature_sampling_method": "anthropic",
    "checkpoint_every_steps": 3,
    "normalize_activations": "expected_average_only_in",
    "train_batch_size": 63,
    "total_training_tokens": 756,
    "micro_batch_size": 40,
    "eval_every_steps": 6,
    "n_eval_batches": 3,
    "dtype": "float64",
    "lm_dtype": "float32",
}


def arguments(folder: Path, **changes: Any) -> list[str]:
    return train({**RUN, **changes}, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(arguments(folder)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two, by torchrun."""
    folder = tmp_path_factory.mktemp("shared")
    return run_by_torchrun(2, folder, *arguments(folder))


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(alone: Path, shared: Path) -> None:
    check_same_run(shared, alone)
    assert {*files_of(shared)} == {*files_of(alone)}
    assert (shared / "report.html").is_file()
    assert json.loads((shared / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words", "n_after"),
    [
        (signal.SIGTERM, "Stopped by SIGTERM after step", 3),
        (signal.SIGTERM, "Stopped by SIGTERM after step", 1),
    ],
)
def test_a_stopped_job_goes_on(number: signal.Signals, words: str, n_after: int, alone: Path, tmp_path: Path) -> None:
    # One of the processes gets the signal, and by its clock all decide whether there is time to save.
    run, said = stopped_after_a_checkpoint(number, tmp_path, *arguments(tmp_path, grace_seconds=600))
    assert words in said and "saved" in said and "not saved" not in said and "Traceback" not in said
    all_end_well(ranks(n_after, tmp_path, "resume", str(run)))
    check_same_run(run, alone)


@pytest.mark.slow
def test_torchrun_starts_a_job_again_that_has_lost_a_process(shared: Path, tmp_path: Path) -> None:
    job, run = torchrun(2, *arguments(tmp_path), options=["--max-restarts", "1"]), tmp_path / "run"
    while not (run / "checkpoints" / "step_3" / "manifest.json").is_file():
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    _, said = job.communicate(timeout=200)
    assert job.returncode == 0, said
    # torchrun may end rank 0 before rank 0 sees that its peer is gone, so what rank 0 says isn't asked for.
    assert said.count("starting ...") == 2 and "Traceback" not in said
    assert files_of(run) == files_of(shared)


@pytest.mark.parametrize(
    ("of_second", "words"),
    [
        ({"k": 9}, ["rank 1 (", "differs from rank 0", "k: rank 0 has 8, rank 1 9"]),
        ({"dataset_path": "OTHER"}, ["rank 1 (", "differs from rank 0", "dataset_path: rank 0 has"]),
    ],
)
def test_processes_that_differ_are_told_where(of_second: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    if "dataset_path" in of_second:
        of_second = {"dataset_path": str(tmp_path / "other.jsonl")}
        Path(of_second["dataset_path"]).write_text('{"text": "All that glitters is not gold. "}\n' * 500)
    first, second = arguments(tmp_path / "a"), arguments(tmp_path / "b", run_dir=str(tmp_path / "a"), **of_second)
    for process in ranks(2, tmp_path, *first, of_second=second):
        _, err = process.communicate()
        assert process.returncode == 1 and all(word in err for word in words), err
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "error: rank 0: some of the 2 ranks did not come within 0.05 minutes"),
        (1, "error: MASTER_ADDR, MASTER_PORT: found localhost:"),
    ],
)
def test_a_process_that_nobody_meets_says_so(number: int, words: str, tmp_path: Path) -> None:
    process = ranks(2, tmp_path, *arguments(tmp_path, parallel_timeout_minutes=0.05), started=[number])[0]
    _, err = process.communicate()
    assert process.returncode == 1 and words in err


def test_checkpoints_by_the_clock_are_those_of_all(alone: Path, tmp_path: Path) -> None:
    changes = {"checkpoint_every_minutes": 0.0002, "checkpoint_every_steps": None}  # clocks differ by more than that
    for process in ranks(2, tmp_path, *arguments(tmp_path, **changes)):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    check_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_stop_in_an_evaluation_leaves_it_to_the_run_that_goes_on(tmp_path: Path) -> None:
    # Three batches: two are the first process's, who would otherwise evaluate for seconds after the stop.
    fields = {"n_eval_batches": 384, "wandb_log_frequency": 1, "checkpoint_every_steps": None}
    job, run = ranks(2, tmp_path, *arguments(tmp_path, **fields)), tmp_path / "run"
    while not (run / "status.json").is_file() or json.loads((run / "status.json").read_text())["step"] < 6:
        assert job[0].poll() is None, job[0].communicate()
        time.sleep(0.02)
    job[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[1] for process in job]
    assert [process.returncode for process in job] == [143, 143], said
    assert "Stopped by SIGTERM after step 6" in said[0]
    assert json.loads((run / "checkpoints" / "step_6" / "state.json").read_text())["pending"] == ["evaluation"]
    assert "ce_loss" not in (run / "metrics.jsonl").read_text()


def test_more_processes_than_rows_are_refused(tmp_path: Path) -> None:
    for process in ranks(2, tmp_path, *arguments(tmp_path, train_batch_size=1, micro_batch_size=None)):
        _, err = process.communicate()
        assert process.returncode == 1
        assert "error: parallel: found 2 ranks for 1 rows that are computed at once, expected as many at most" in err
