"""What a user did wrong, through the real command line: exit code 1, a message that names what was found and what to
do, no traceback, and nothing half-written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from small import D_IN, D_SAE, N_LAYERS
from torch import Tensor

import sae_training
from sae_training import cli
from sae_training.activations_store.cache_writer import CacheWriter
from sae_training.config.io import config_to_dict
from sae_training.run import checkpoint
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import SAETrainer, StepResult


class Answer(NamedTuple):
    code: int
    message: str
    said: str


Train = Callable[..., Answer]
Check = Callable[[], None]
Mount = Callable[[int], Path]
RUNS = "runs"


@pytest.fixture
def train(small_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """`sae-training train --config <the small run>` with flags added: exit code, stderr without the bars, stdout."""
    config_file = tmp_path / "run.json"
    config_file.write_text(json.dumps(config_to_dict(small_config())))

    def run(*flags: str) -> Answer:
        capsys.readouterr()
        code = cli.main(["train", "--config", str(config_file), *flags])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Answer(code, captured.err.rpartition("\r")[2], captured.out)

    return run


def check_refused(answer: Answer, *parts: str) -> None:
    assert answer.code == 1
    assert "error: " in [line[:7] for line in answer.message.splitlines()]  # a progress bar may stand before it
    missing = [part for part in parts if part not in answer.message]
    assert not missing, f"{missing} not in: {answer.message}"


@pytest.fixture
def nothing_left(tmp_path: Path) -> Check:
    """Checks that the command left no run folder, nor anything half-written where it was called."""

    def check() -> None:
        assert not (tmp_path / RUNS).exists()
        assert not list(tmp_path.rglob("*.tmp"))

    return check


# ------------------------------------------------------------------------------------- values that do not fit the model


def test_unknown_hook_lists_the_hooks_and_the_nearest(train: Train, nothing_left: Check) -> None:
    answer = train("--hook-point", "blocks.1.hook_resid_pots")
    check_refused(answer, "'blocks.1.hook_resid_pots'", "Did you mean blocks.1.hook_resid_post?")
    check_refused(answer, "blocks.{layer}.hook_mlp_out", "blocks.{layer}.attn.hook_z", f"layer 0 to {N_LAYERS - 1}")
    nothing_left()


def test_hook_of_a_layer_that_the_model_lacks_names_both_counts(train: Train, nothing_left: Check) -> None:
    check_refused(
        train("--hook-point", "blocks.9.hook_resid_post"),
        "block 9",
        f"this model has {N_LAYERS}; choose a layer from 0 to {N_LAYERS - 1}",
    )
    nothing_left()


def test_wrong_d_in_names_both_widths(train: Train, nothing_left: Check) -> None:
    check_refused(train("--d-in", "300"), "d_in: got 300", f"is {D_IN} wide", f"use d_in={D_IN}")
    nothing_left()


def test_context_longer_than_the_models_names_both_lengths(train: Train, nothing_left: Check) -> None:
    check_refused(train("--context-size", "300"), "context_size: got 300", "at most 256")
    nothing_left()


def test_k_larger_than_d_sae_names_both(train: Train, nothing_left: Check) -> None:
    answer = train("--architecture", "topk", "--k", "600")
    check_refused(answer, "k: found 600", f"d_sae = {D_SAE}", "lower k or raise expansion_factor")
    nothing_left()


def test_k_larger_than_the_d_sae_that_the_model_gives_names_both(train: Train, nothing_left: Check) -> None:
    # d_in is known only when the model is there: the check comes again.
    answer = train("--architecture", "topk", "--k", "600", "--d-in", "None")
    check_refused(answer, "k: found 600", f"d_sae = {D_SAE}", "lower k or raise expansion_factor")
    nothing_left()


def test_batch_larger_than_the_buffer_names_both(train: Train, nothing_left: Check) -> None:
    answer = train("--train-batch-size", "200")
    check_refused(answer, "train_batch_size: found 200", "at most 128", "raise n_batches_in_buffer to 7")
    nothing_left()


def test_several_problems_are_reported_at_once(train: Train, nothing_left: Check) -> None:
    answer = train("--train-batch-size", "200", "--architecture", "topk", "--k", "600")
    check_refused(answer, "2 problems", "k: found 600", "train_batch_size: found 200")
    nothing_left()


def test_missing_model_folder_is_named(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    answer = train("--model-name", str(tmp_path / "no-model"))
    check_refused(answer, "model_name", "there is no folder", str(tmp_path / "no-model"))
    nothing_left()


# ----------------------------------------------------------------------------------------------------------- bad data


def test_missing_dataset_names_the_path_and_what_is_near(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    (tmp_path / "speeches.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    missing = tmp_path / "speech.jsonl"
    check_refused(train("--dataset-path", str(missing)), "dataset_path", str(missing), "speeches.jsonl")
    nothing_left()


def test_dataset_without_text_column_lists_its_columns(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"price": 1.5, "count": 2}\n', encoding="utf-8")
    answer = train("--dataset-path", str(path))
    check_refused(answer, str(path), "price (float64)", "count (int64)", "set dataset_text_column")
    nothing_left()


def test_unknown_text_column_names_the_nearest(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    path = tmp_path / "prose.jsonl"
    path.write_text('{"story": "a", "title": "b"}\n', encoding="utf-8")
    answer = train("--dataset-path", str(path), "--dataset-text-column", "storys")
    check_refused(answer, "'storys'", "story (string), title (string)", "did you mean 'story'?")
    nothing_left()


@pytest.mark.parametrize("content", ["", "\n"], ids=["0 bytes", "0 rows"])
def test_empty_dataset_says_so(train: Train, nothing_left: Check, tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    check_refused(train("--dataset-path", str(path)), "dataset_path", str(path))


def test_dataset_of_empty_texts_says_so(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": ""}\n{"text": ""}\n', encoding="utf-8")
    check_refused(train("--dataset-path", str(path)), str(path))
    nothing_left()


def test_dataset_shorter_than_what_is_held_out_says_so(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "A short text."}\n', encoding="utf-8")
    check_refused(train("--dataset-path", str(path)), str(path))
    nothing_left()


def test_missing_evaluation_dataset_is_told_before_training(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    missing = tmp_path / "held_out.jsonl"
    check_refused(train("--eval-dataset-path", str(missing)), str(missing))
    nothing_left()


def test_missing_pretrained_autoencoder_is_told_before_training(
    train: Train, nothing_left: Check, tmp_path: Path
) -> None:
    missing = tmp_path / "sae.safetensors"
    check_refused(train("--from-pretrained-path", str(missing)), str(missing), "no such file")
    nothing_left()


def test_pretrained_autoencoder_of_another_width_names_both(
    train: Train, nothing_left: Check, small_config: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "sae.safetensors"
    SparseAutoencoder(small_config(expansion_factor=1)).save_model(path)
    answer = train("--from-pretrained-path", str(path))
    check_refused(answer, f"({D_IN}, {D_IN})", f"({D_IN}, {D_SAE})", "expansion_factor")
    nothing_left()


# ------------------------------------------------------------------------------------------------------ folder and disk


def test_run_dir_under_a_file_names_the_path(train: Train, nothing_left: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    target = tmp_path / "file" / "runs"
    check_refused(train("--run-dir", str(target)), f"cannot write to {target / 'run'}", "set run_dir to a folder")
    nothing_left()


def test_run_dir_where_nobody_may_write_names_the_path(train: Train, nothing_left: Check) -> None:
    check_refused(train("--run-dir", "/proc/runs"), "cannot write to /proc/runs/run", "set run_dir to a folder")
    nothing_left()


# A checkpoint of the small run has weights of 2 x 192 x 384 floats and their two moments, and a buffer of 256 rows of
# 192 floats: about 1.9 MiB. Three of them (keep_checkpoints and the one being written) and 16 MiB must be free.
def test_disk_too_small_for_the_checkpoints_is_refused_before_training(train: Train, small_disk: Mount) -> None:
    disk = small_disk(8)
    check_refused(train("--run-dir", str(disk)), str(disk / "run"), "8 MiB are free", "set run_dir to another disk")
    assert not list(disk.rglob("*"))


def test_after_a_full_disk_a_smaller_run_of_the_same_name_can_start(train: Train, small_disk: Mount) -> None:
    disk = small_disk(30)
    check_refused(train("--run-dir", str(disk), "--expansion-factor", "16"), "30 MiB are free")
    assert train("--run-dir", str(disk), "--expansion-factor", "1").code == 0


def at_step(number: int, act: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Have runs do something at the beginning of a step, as long as `patch` lasts."""
    real_step = SAETrainer.step

    def step_after_it(self: SAETrainer, x: Tensor, step: int, target: Tensor) -> StepResult:
        if step == number:
            act()
        return real_step(self, x, step, target)

    patch.setattr(SAETrainer, "step", step_after_it)


def test_disk_that_fills_up_loses_a_checkpoint_but_not_the_run(
    train: Train, small_disk: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(40)
    at_step(5, lambda: (disk / "somebody elses").write_bytes(bytes(20 * 2**20)), monkeypatch)
    answer = train("--run-dir", str(disk), "--checkpoint-every-steps", "4")
    assert answer.code == 0
    assert "Checkpoint not saved" in answer.said
    assert [p.name for p in checkpoint.complete_checkpoints(disk / "run" / "checkpoints")] == ["step_4"]
    assert (disk / "run" / "final" / "sae.safetensors").is_file()
    assert not list(disk.rglob("*.tmp"))


def test_disk_without_room_for_the_final_weights_is_told_and_the_run_can_be_finished_later(
    train: Train, small_disk: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_training.run.save.WAIT_FOR_ROOM", 0.0)
    disk = small_disk(40)
    filler = disk / "somebody elses"

    def fill_up() -> None:
        """Leave room for metrics, not for a megabyte of weights."""
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 2**19))

    with monkeypatch.context() as patch:
        at_step(11, fill_up, patch)  # the last
        answer = train("--run-dir", str(disk), "--checkpoint-every-steps", "4")
    check_refused(answer, str(disk / "run"), "space")
    assert not (disk / "run" / "final").exists()
    assert json.loads((disk / "run" / "status.json").read_text(encoding="utf-8"))["state"] == "failed"
    filler.unlink()
    assert train("--run-dir", str(disk)).code == 0
    assert (disk / "run" / "final" / "sae.safetensors").is_file()


def test_a_run_waits_for_room_for_what_it_cannot_do_without(
    train: Train, small_disk: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(40)
    filler = disk / "somebody elses"

    monkeypatch.setattr("sae_training.run.save.TRY_EVERY", 0.1)
    with monkeypatch.context() as patch:
        at_step(11, lambda: filler.write_bytes(bytes(shutil.disk_usage(disk).free - 2**19)), patch)
        patch.setattr("sae_training.run.save.stop_point", filler.unlink)  # once it waits
        answer = train("--run-dir", str(disk), "--checkpoint-every-steps", "4", "--n-checkpoints", "1")
    assert answer.code == 0, answer.said
    assert "Waiting for room, at most 10 minutes." in answer.said
    assert (disk / "run" / "final" / "sae.safetensors").is_file() and not list(disk.rglob("*.tmp"))


def fill(disk: Path) -> None:
    """Write until there is no room for a byte."""
    with (disk / "somebody elses").open("ab", buffering=0) as file:
        while room := shutil.disk_usage(disk).free:
            file.write(bytes(room))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "tale.txt"
    path.write_text("Many a word of one long tale. " * 2000, encoding="utf-8")
    return path


def test_disk_without_room_for_a_row_of_metrics_names_the_folder_and_how_to_go_on(
    train: Train, small_disk: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_training.run.save.WAIT_FOR_ROOM", 0.0)
    disk = small_disk(40)
    words = ("--run-dir", str(disk), "--run-name", "one & two #3", "--checkpoint-every-steps", "4")
    with monkeypatch.context() as patch:
        at_step(5, lambda: fill(disk), patch)
        answer = train(*words, "--wandb-log-frequency", "1")
    run = disk / "one & two #3"
    check_refused(answer, f"{run}", "no space left on the disk, 0 MiB are free; delete")
    check_refused(answer, f"Last checkpoint: {run}/checkpoints/step_4.", f"python -m sae_training resume '{run}'")
    assert "Errno" not in answer.message
    (disk / "somebody elses").unlink()
    assert train(*words).code == 0
    assert (run / "final" / "sae.safetensors").is_file()


def test_cache_on_a_disk_that_fills_up_names_the_folder_and_goes_on(
    small_disk: Mount, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(40)
    real_pass = CacheWriter.write_pass

    def pass_on_a_filling_disk(self: CacheWriter, i: int, tokens: Tensor, activations: list[Tensor]) -> None:
        if i == 2:
            fill(disk)
        real_pass(self, i, tokens, activations)

    command = ["cache", "demo", str(text_file), "--hook_point=blocks.0.hook_resid_post", "--store_batch_size=4"]
    command += ["--context_size=32", "--total_training_tokens=1000", f"--cached_activations_path={disk / 'a b'}"]
    command += ["--shard_size_mb=1", "--lm_dtype=float32"]
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_pass", pass_on_a_filling_disk)
        assert cli.main(command) == 1
    message = capsys.readouterr().err
    assert f"error: {disk / 'a b'}: no space left on the disk, 0 MiB are free;" in message
    assert f"Once there is room, the same command continues {disk / 'a b'}." in message
    (disk / "somebody elses").unlink()
    assert cli.main(command) == 0


def test_pretokenized_text_on_a_full_disk_names_it_and_leaves_nothing(
    small_disk: Mount, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1)
    fill(disk)
    assert cli.main(["pretokenize", "demo", str(text_file), str(disk / "tokens"), "--n_processes=1"]) == 1
    message = capsys.readouterr().err
    assert str(disk) in message
    assert "no space left on the disk" in message
    assert [path.name for path in disk.iterdir()] == ["somebody elses"]


# ----------------------------------------------------------------------------------------------------- start and resume


@pytest.fixture
def die_at_step_9(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs die in their tenth step the first time that they come to it."""
    real_step = SAETrainer.step

    def dying_step(self: SAETrainer, x: Tensor, step: int, target: Tensor) -> StepResult:
        if step == 9:
            monkeypatch.setattr(SAETrainer, "step", real_step)
            raise OSError("killed")
        return real_step(self, x, step, target)

    monkeypatch.setattr(SAETrainer, "step", dying_step)
    yield


@pytest.fixture
def unfinished(train: Train, tmp_path: Path, die_at_step_9: None) -> Path:
    """The folder of a run that died in its tenth step, with checkpoints after steps 4 and 8."""
    assert train("--checkpoint-every-steps", "4").code == 1
    return tmp_path / RUNS / "run"


def test_truncated_checkpoint_is_passed_over_for_the_one_before(train: Train, unfinished: Path) -> None:
    weights = unfinished / "checkpoints" / "step_8" / "sae.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    answer = train()
    assert answer.code == 0
    assert f"{weights}: found {size // 2} bytes, expected {size} bytes" in answer.said
    assert f"Continuing {unfinished} after step 4." in answer.said


def test_damaged_checkpoints_alone_start_the_run_anew_and_say_so(train: Train, unfinished: Path) -> None:
    for step in (4, 8):
        os.truncate(unfinished / "checkpoints" / f"step_{step}" / "trainer.safetensors", 100)
    answer = train()
    assert answer.code == 0
    assert answer.said.count("trainer.safetensors: found 100 bytes") == 2
    assert "from the beginning" in answer.said


def test_config_changed_between_start_and_resume_names_each_field(train: Train, unfinished: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in unfinished.rglob("*"))
    answer = train("--l1-coefficient", "0.5", "--seed", "7", "--wandb-log-frequency", "1")
    check_refused(answer, str(unfinished), "l1_coefficient: 0.001 -> 0.5", "seed: 42 -> 7", 'resume="never"')
    assert "wandb_log_frequency" not in answer.message
    assert sorted((p, p.stat().st_mtime_ns) for p in unfinished.rglob("*")) == before


def test_data_changed_between_start_and_resume_is_told(train: Train, tmp_path: Path, die_at_step_9: None) -> None:
    path = tmp_path / "prose.jsonl"
    rows = [json.dumps({"text": "Many a word of one long tale. " * 200}) for _ in range(5)]
    path.write_text("\n".join(rows), encoding="utf-8")
    assert train("--dataset-path", str(path), "--checkpoint-every-steps", "4").code == 1
    path.write_text("\n".join(rows[:4]), encoding="utf-8")
    answer = train("--dataset-path", str(path))
    check_refused(answer, str(path), "4 rows, expected", "5 rows, as the run has read it")


def test_resume_must_without_a_run_names_the_folder(train: Train, tmp_path: Path) -> None:
    check_refused(train("--resume", "must"), str(tmp_path / RUNS), "'run'", "no folder of that name")
    assert not (tmp_path / RUNS).exists()


@pytest.mark.parametrize("verb", ["resume", "eval", "report"])
def test_verbs_on_a_folder_that_is_no_run_say_so(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "no run"
    assert cli.main([verb, str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(folder) in error
    assert not folder.exists()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_second_process_on_a_run_folder_is_refused_and_sigterm_saves_the_first(
    train: Train, small_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_run = ("--total-training-tokens", "1e9", "--wandb-log-frequency", "1")
    command = [sys.executable, "-m", "sae_training", "train", "--config", str(tmp_path / "run.json"), *long_run]
    environment = {**os.environ, "PYTHONPATH": str(Path(sae_training.__file__).parent.parent)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / RUNS / "run"
    try:
        wait_until((folder / "metrics.jsonl").exists, first)
        check_refused(train(*long_run), str(folder), f"process {first.pid} on ", "Wait for it", "run_name")
        first.send_signal(signal.SIGTERM)
        _, message = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in message
    assert "Stopped by SIGTERM after step" in message
    assert f"python -m sae_training resume {folder}" in message
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "interrupted"
    assert checkpoint.complete_checkpoints(folder / "checkpoints")[0].name == f"step_{status['step']}"
