from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_to_dict
from sae_training.run.folder import RunFolder, check_paths, choose_run_folder, read_run_config

Make = Callable[..., LanguageModelSAERunnerConfig]


def start_run(cfg: LanguageModelSAERunnerConfig, finished: bool = False) -> Path:
    """A run folder as a process leaves it that was killed, or that has finished."""
    folder = RunFolder(choose_run_folder(cfg), cfg)
    folder.release()
    if finished:
        folder.final.mkdir()
    return folder.path


# ------------------------------------------------------------------------------------------------------ which folder


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_first_run_of_a_name_takes_the_folder_of_that_name(small_config: Make, tmp_path: Path, resume: str) -> None:
    assert choose_run_folder(small_config(resume=resume)) == tmp_path / "runs" / "run"


def test_choosing_touches_nothing(small_config: Make, tmp_path: Path) -> None:
    choose_run_folder(small_config())
    assert list(tmp_path.iterdir()) == []


def test_must_without_any_run_is_an_error(small_config: Make) -> None:
    with pytest.raises(FileNotFoundError, match="no unfinished run 'run' .no folder of that name"):
        choose_run_folder(small_config(resume="must"))


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_unfinished_run_is_continued(small_config: Make, resume: str) -> None:
    folder = start_run(small_config())
    assert choose_run_folder(small_config(resume=resume)) == folder


def test_never_leaves_an_unfinished_run_alone(small_config: Make, tmp_path: Path) -> None:
    start_run(small_config())
    assert choose_run_folder(small_config(resume="never")) == tmp_path / "runs" / "run-2"


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_after_a_finished_run_the_next_number_is_new(small_config: Make, tmp_path: Path, resume: str) -> None:
    start_run(small_config(), finished=True)
    assert choose_run_folder(small_config(resume=resume)) == tmp_path / "runs" / "run-2"


def test_must_after_finished_runs_alone_lists_them(small_config: Make) -> None:
    start_run(small_config(), finished=True)
    start_run(small_config(), finished=True)
    with pytest.raises(FileNotFoundError, match="finished runs: run, run-2"):
        choose_run_folder(small_config(resume="must"))


def test_unfinished_run_after_a_finished_one_is_continued(small_config: Make) -> None:
    start_run(small_config(), finished=True)
    folder = start_run(small_config())
    assert folder.name == "run-2"
    assert choose_run_folder(small_config()) == folder


def test_of_two_unfinished_runs_the_newer_is_continued(small_config: Make) -> None:
    start_run(small_config())
    newer = start_run(small_config(resume="never"))
    assert choose_run_folder(small_config()) == newer


def test_folder_killed_before_its_config_was_written_is_used_again(small_config: Make, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / ".lock").touch()
    assert choose_run_folder(small_config(resume="auto")) == tmp_path / "runs" / "run"


def test_slash_in_a_name_makes_no_folder_of_its_own(small_config: Make, tmp_path: Path) -> None:
    assert choose_run_folder(small_config(run_name="mine/1")) == tmp_path / "runs" / "mine_1"


def test_old_name_of_run_dir_is_followed(small_config: Make, tmp_path: Path) -> None:
    cfg = small_config(run_dir="runs", checkpoint_path=str(tmp_path / "old"))
    assert choose_run_folder(cfg) == tmp_path / "old" / "run"


# -------------------------------------------------------------------------------------------------------- same config


def test_changed_config_names_each_field_with_both_values(small_config: Make) -> None:
    folder = start_run(small_config())
    with pytest.raises(ValueError) as caught:
        choose_run_folder(small_config(seed=7, lr=1e-5))
    message = str(caught.value)
    assert message.startswith(f"{folder} holds an unfinished run")
    assert "  seed: 42 -> 7\n" in message
    assert "  lr: 0.0003 -> 1e-05\n" in message
    assert message.count("->") == 2


def test_changed_config_may_begin_anew(small_config: Make, tmp_path: Path) -> None:
    start_run(small_config())
    assert choose_run_folder(small_config(seed=7, resume="never")) == tmp_path / "runs" / "run-2"


@pytest.mark.parametrize(
    "change",
    [
        {"wandb_log_frequency": 1},
        {"eval_every_steps": 99},
        {"log_to_wandb": True, "wandb_project": "other", "wandb_mode": "offline"},
        {"checkpoint_every_steps": 3, "checkpoint_every_minutes": None, "keep_checkpoints": 5},
        {"n_checkpoints": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fields_that_only_watch_may_change(small_config: Make, change: dict[str, Any]) -> None:
    folder = start_run(small_config())
    assert choose_run_folder(small_config(**change)) == folder


# ------------------------------------------------------------------------------------------------- on another machine


def moved_text(
    small_config: Make, tmp_path: Path, text: str = "as before"
) -> tuple[Path, LanguageModelSAERunnerConfig]:
    """Return an unfinished run's folder, and its config with the text in another folder than when the run began."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    here, there = tmp_path / "here" / "a.txt", tmp_path / "there" / "a.txt"
    here.write_text("as before")
    folder = start_run(small_config(dataset_path=[str(here), "demo"], dataset_weights=(1.0, 2.0)))
    here.unlink()
    there.write_text("as before")
    return folder, small_config(dataset_path=[str(there), "demo"], dataset_weights=(1.0, 2.0))


def test_a_run_goes_on_where_its_text_lies_elsewhere(
    small_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cfg = moved_text(small_config, tmp_path)
    assert choose_run_folder(cfg) == folder
    assert f"is not here; this run goes on with {cfg.dataset_path}." in "".join(capsys.readouterr())
    RunFolder(folder, cfg).release()
    assert read_run_config(folder) == cfg, "the run is resumed by its folder alone from now on"


def test_a_text_of_another_name_or_beside_the_old_one_is_another_text(small_config: Make, tmp_path: Path) -> None:
    folder, cfg = moved_text(small_config, tmp_path)
    (tmp_path / "there" / "b.txt").write_text("as before")
    with pytest.raises(ValueError, match="another config:\n  dataset_path"):
        choose_run_folder(
            small_config(dataset_path=[str(tmp_path / "there" / "b.txt"), "demo"], dataset_weights=(1, 2))
        )
    (tmp_path / "here" / "a.txt").write_text("as before")
    with pytest.raises(ValueError, match="another config:\n  dataset_path"):
        choose_run_folder(cfg)


def test_what_is_not_here_is_named(small_config: Make, tmp_path: Path) -> None:
    folder, cfg = moved_text(small_config, tmp_path)
    message = "dataset_path: .*here/a.txt, which .* is not here.*resume .* --dataset_path NEW"
    with pytest.raises(FileNotFoundError, match=message):
        check_paths(folder, read_run_config(folder))
    check_paths(folder, cfg)


def test_held_out_part_may_not_change(small_config: Make) -> None:
    start_run(small_config())
    with pytest.raises(ValueError, match="n_eval_batches: 1 -> 2"):
        choose_run_folder(small_config(n_eval_batches=2))


def test_config_of_a_folder_is_read_back(small_config: Make) -> None:
    cfg = small_config(architecture="topk", k=5)
    assert read_run_config(start_run(cfg)) == cfg


def test_config_file_says_the_versions(small_config: Make) -> None:
    content = json.loads((start_run(small_config()) / "config.json").read_text())
    assert content["config"] == config_to_dict(small_config())
    assert set(content["versions"]) >= {"sae-training", "torch", "transformer-lens"}


def test_folder_without_config_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run folder, it has no config.json"):
        read_run_config(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "gpt2"}', "[]", "not json"], ids=["a model", "a list", "text"])
def test_a_folder_whose_config_is_another_programs_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: not the config of a run; expected a run folder"):
        read_run_config(tmp_path)


# --------------------------------------------------------------------------------------------------------------- lock


@pytest.mark.parametrize("trace", ["metrics.jsonl", "k8/metrics.jsonl", "checkpoints/step_8/sae.safetensors"])
def test_a_run_that_an_earlier_version_began_gets_no_environment_of_now(
    small_config: Make, tmp_path: Path, trace: str
) -> None:
    path = tmp_path / "runs" / "run"
    file = path / trace
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    RunFolder(path, small_config()).release()
    assert not (path / "environment.json").exists()


def test_released_folder_can_be_taken_again_in_the_same_process(small_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "run"
    RunFolder(path, small_config()).release()
    again = RunFolder(path, small_config(seed=7))
    assert again.lock.is_locked
    assert read_run_config(path).seed == 7
    again.release()
    assert not again.lock.is_locked


def test_status_says_who_and_when(small_config: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "run", small_config())
    folder.write_status("training", step=3, eta_s=None)
    folder.release()
    status = json.loads((folder.path / "status.json").read_text())
    assert (status["state"], status["step"], status["eta_s"]) == ("training", 3, None)
    assert (status["pid"], status["host"]) == (os.getpid(), socket.gethostname())
    assert status["started"] <= status["updated"]


# -------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", ["under a file", "/proc"])
def test_folder_that_cannot_be_made_is_named(small_config: Make, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run" if kind == "under a file" else Path("/proc/runs/run")
    with pytest.raises(OSError, match=f"run_dir: cannot write to {path} .*; set run_dir to a folder you may write to"):
        RunFolder(path, small_config())


def test_choosing_under_a_file_is_no_error_of_its_own(small_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cfg = small_config(run_dir=str(tmp_path / "file"))
    assert choose_run_folder(cfg) == tmp_path / "file" / "run"


def test_start_that_fails_in_a_folder_that_was_there_deletes_nothing(small_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "proj" / "results"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    folder = RunFolder(path, small_config())
    folder.discard_if_new()
    folder.release()
    assert (path / "notes.txt").read_text() == "mine"


def test_start_that_fails_in_a_new_folder_leaves_none(small_config: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "run", small_config())
    folder.discard_if_new()
    folder.release()
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_begun_is_held_by_nobody(small_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / "config.json").mkdir(parents=True)  # where a file is to be written
    for _ in range(2):  # the lock, too, is free again
        with pytest.raises(IsADirectoryError):
            RunFolder(tmp_path / "run", small_config())
        assert not (tmp_path / "run" / ".holder.json").exists()


def test_a_toy_run_is_refused_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": {"n_features": 8}, "versions": {}}')
    (tmp_path / "status.json").write_text('{"kind": "toy", "state": "finished"}')
    with pytest.raises(ValueError, match="is a toy run, expected one on a language model"):
        read_run_config(tmp_path)
