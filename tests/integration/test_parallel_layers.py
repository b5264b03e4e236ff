"""Autoencoders dealt out to processes under torchrun: the same bytes as from one process, whatever stops them."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from jobs import all_end_well, files_of, ranks, run_by_torchrun, stopped_after_a_checkpoint, train
from small import N_LAYERS, SMALL_RUN

from sae_training import cli
from sae_training.parallel.balance import shared_out

# Autoencoders of two places and two sizes, a remedy that looks at the buffer, and a window that ends in between.
RUN: dict[str, Any] = {
    **SMALL_RUN,
    "hook_point": "blocks.{layer}.hook_resid_post",
    "hook_point_layer": [0, N_LAYERS - 1],
    "expansion_factor": [1, 2],
    "architecture": "topk",
    "k": 8,
    "auxk_coefficient": 1 / 32,
    "feature_sampling_method": "anthropic",
    "checkpoint_every_steps": 3,
    "normalize_activations": "expected_average_only_in",
    "eval_every_steps": 6,
}


def arguments(folder: Path, **changes: Any) -> list[str]:
    return train({**RUN, "parallel": "layers", **changes}, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(arguments(folder)) == 0
    return files_of(folder / "run")


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(alone: dict[str, bytes], tmp_path: Path) -> None:
    run = run_by_torchrun(2, tmp_path, *arguments(tmp_path))
    assert files_of(run) == alone
    assert (run / "report.html").is_file()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words", "n_after"),
    [
        (signal.SIGKILL, "error: rank 0: another process of the job has ended", 3),
        (signal.SIGTERM, "Stopped by SIGTERM after step", 1),
    ],
)
def test_a_stopped_job_goes_on_with_any_number_of_processes(
    number: signal.Signals, words: str, n_after: int, alone: dict[str, bytes], tmp_path: Path
) -> None:
    run, said = stopped_after_a_checkpoint(number, tmp_path, *arguments(tmp_path))
    assert words in said and "Traceback" not in said
    all_end_well(ranks(n_after, tmp_path, "resume", str(run)))
    assert files_of(run) == alone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hook_point_layer": [0], "expansion_factor": 1},
            "error: parallel: found 2 ranks for 1 autoencoders, expected as many at most",
        ),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    for process in ranks(2, tmp_path, *arguments(tmp_path, **changes)):
        _, err = process.communicate()
        assert process.returncode == 1 and words in err
    assert not (tmp_path / "run").exists()


def test_what_is_given_up_on_another_process_is_in_the_status(tmp_path: Path) -> None:
    fields = {**SMALL_RUN, "lr": [1e-3, 1e30], "lr_warm_up_steps": 0, "eval_every_steps": 0, "parallel": "layers"}
    all_end_well(ranks(2, tmp_path, *train(fields, tmp_path)))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert [*status["failed"]] == ["lr-1e+30"] and "not finite" in status["failed"]["lr-1e+30"]


def test_all_that_the_processes_write_must_fit_on_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, keep_checkpoints=10**8)
    assert cli.main(words) == 1
    (needed,) = re.findall(r"keep_checkpoints, .* need (.*?),", alone := capsys.readouterr().err)
    for process in ranks(2, tmp_path, *words):
        _, err = process.communicate()
        assert process.returncode == 1
        assert f"need {needed}," in err, alone
    assert not (tmp_path / "run").exists()


def test_autoencoders_are_dealt_out_by_their_cost() -> None:
    costs = {"a": 1.0, "b": 8.0, "c": 4.0, "d": 4.0, "e": 1.0}
    assert shared_out(costs, 2) == [["a", "b"], ["c", "d", "e"]]
    assert shared_out(costs, 1) == [list(costs)]
    assert sorted(sum(shared_out(costs, 5), [])) == list(costs)
    with pytest.raises(ValueError, match="found 6 ranks for 5 autoencoders"):
        shared_out(costs, 6)
