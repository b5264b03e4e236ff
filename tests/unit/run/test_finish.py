"""How a run ends: its last evaluation, and what is on the disk before final/ says that it is finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from small import SMALL_RUN

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import run_config
from sae_training.machine.files import NotEnoughDisk
from sae_training.parallel.ranks import CONTROL, of_all, rank
from sae_training.run.finish import last_evaluation
from sae_training.run.logger import RunLogger
from sae_training.run.save import save_weights_folder
from sae_training.run.state import Run


def said_of_an_error(checkpoint: Path) -> list[list[str]]:
    """Return the notes of each process's error; the second alone has text to evaluate on, and no model for it."""
    CONTROL.append(dist.new_group(backend="gloo"))
    nothing: Any = None
    cfg = LanguageModelSAERunnerConfig(**{**SMALL_RUN, "eval_every_steps": 1000})
    held_out = torch.zeros(rank(), 16, dtype=torch.int64)
    run = Run(cfg, nothing, nothing, [], nothing, held_out, step=12, last_checkpoint=checkpoint)
    notes = []
    try:
        last_evaluation(run)
    except AttributeError as error:
        notes = error.__notes__
    return of_all(notes)


def test_an_error_of_one_process_alone_does_not_make_it_save(tmp_path: Path) -> None:
    for none, (note,) in on_ranks(2, said_of_an_error, tmp_path / "step_9"):
        assert none == []
        assert note.startswith(f"All 12 steps are trained, the last checkpoint is {tmp_path / 'step_9'}. Once this is")


def test_all_rows_are_on_the_disk_before_final_is_there(
    small_config: Callable[..., LanguageModelSAERunnerConfig], demo_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, flushed = RunLogger.flush_to_disk, list[tuple[int, bool]]()

    def seen(logger: RunLogger) -> None:
        flushed.append((logger.path.stat().st_size, (logger.path.parent / "final").exists()))
        flush(logger)

    monkeypatch.setattr(RunLogger, "flush_to_disk", seen)
    run = run_config(small_config(), demo_model).folder
    assert flushed[-1] == ((run.path / "metrics.jsonl").stat().st_size, False) and run.final.is_dir()


def test_weights_without_room_for_their_folder_name_it(
    small_config: Callable[..., LanguageModelSAERunnerConfig], demo_model: Any, small_disk: Callable[..., Path]
) -> None:
    (member,) = run_config(small_config(), demo_model).members
    disk = small_disk(8, nr_inodes=2)  # of which the disk's own folder takes one
    with pytest.raises(NotEnoughDisk, match=f"^{disk}.*no space left on the disk"):
        save_weights_folder(member, disk / "snapshots" / "step_1")
