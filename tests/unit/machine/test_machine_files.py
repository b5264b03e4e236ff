"""What is said when a disk is full, by real writes to one (/dev/full, and a small disk where one can be mounted)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import create_engine, text

from sae_training.machine.files import NotEnoughDisk, disk_named, write_safetensors, write_text
from sae_training.machine.lock import exclusive
from sae_training.run.checkpoint import save_checkpoint
from sae_training.run.logger import RunLogger

Fill = Callable[[], None]

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")


def told(folder: Path) -> str:
    """What the message says, as a pattern."""
    return (
        re.escape(str(folder)) + r": no space left on the disk, [\d,]+ MiB are free; delete what is no longer needed "
        r"there \(old runs, checkpoints, caches\), or write to another disk"
    )


def write_to_a_full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("a" * 100_000)


@needs_dev_full
def test_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDisk, match=told(tmp_path / "runs")), disk_named(tmp_path / "runs"):
        write_to_a_full_disk()


@needs_dev_full
def test_full_disk_is_named_through_the_errors_of_libraries(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDisk, match=told(tmp_path)), disk_named(tmp_path):
        try:
            write_to_a_full_disk()
        except OSError as error:
            raise RuntimeError("an error occurred while generating the dataset") from error


@needs_dev_full
def test_innermost_folder_is_named_and_the_outermost_says_how_to_go_on(tmp_path: Path) -> None:
    with (
        pytest.raises(NotEnoughDisk, match=told(tmp_path / "inner")) as caught,
        disk_named(tmp_path, then="The same command continues it."),
        disk_named(tmp_path / "inner"),
    ):
        write_to_a_full_disk()
    assert caught.value.__notes__ == ["The same command continues it."]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("found 28"), KeyError("28")])
def test_other_errors_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, disk_named(tmp_path):
        raise error
    assert caught.value is error


@pytest.fixture
def full(small_disk: Callable[..., Path]) -> tuple[Path, Fill]:
    """A disk of 1 MiB, and what fills it up."""
    disk = small_disk(1)

    def fill() -> None:
        with (disk / "somebody elses").open("ab", buffering=0) as file:
            while room := shutil.disk_usage(disk).free:
                file.write(bytes(room))

    return disk, fill


def test_a_database_names_the_folder(full: tuple[Path, Fill]) -> None:
    disk, fill = full
    engine = create_engine(f"sqlite:///{disk / 'a.sqlite'}")
    with engine.begin() as connection:
        connection.execute(text("create table t (b blob)"))
    fill()
    with pytest.raises(NotEnoughDisk, match=told(disk)), disk_named(disk), engine.begin() as connection:
        connection.execute(text("insert into t values (zeroblob(100000))"))
    engine.dispose()


def test_text_and_tensors_name_the_folder(full: tuple[Path, Fill]) -> None:
    disk, fill = full
    fill()
    with pytest.raises(NotEnoughDisk, match=told(disk)):
        write_text(disk / "text.json", "a" * 100_000)
    with pytest.raises(NotEnoughDisk, match=told(disk)):
        write_safetensors(disk / "a.safetensors", {"a": torch.zeros(100_000)})
    assert {path.name for path in disk.iterdir()} == {"somebody elses"}


def test_rows_wait_for_room(full: tuple[Path, Fill]) -> None:
    disk, fill = full
    said: list[str] = []
    logger = RunLogger(disk / "run", config={}, notify=said.append)
    logger.log({"a": 1}, 1, 1)
    fill()
    for step in range(2, 1000):
        logger.log({"a": 1}, step, 1)
    (message,) = said
    assert "rows are kept in memory until there is room" in message and str(disk / "run") in message
    with pytest.raises(NotEnoughDisk, match=told(disk / "run")):
        logger.position()  # on which a checkpoint would count
    (disk / "somebody elses").unlink()
    logger.log({"a": 1}, 1000, 1)
    assert logger.position() == logger.path.stat().st_size
    logger.close()
    steps = [json.loads(line)["step"] for line in logger.path.read_text().splitlines()]
    assert steps == list(range(1, 1001))


def test_rows_that_never_find_room_are_an_error_in_the_end(full: tuple[Path, Fill]) -> None:
    disk, fill = full
    logger = RunLogger(disk / "run", config={}, notify=lambda _: None)
    fill()
    for step in range(1000):
        logger.log({"a": 1}, step, 1)
    with pytest.raises(NotEnoughDisk, match=told(disk / "run")):
        logger.close()
    logger.close()


def test_state_of_a_checkpoint_names_the_folder(full: tuple[Path, Fill], monkeypatch: pytest.MonkeyPatch) -> None:
    disk, fill = full
    monkeypatch.setattr("sae_training.machine.files.SPARE_BYTES", 0)  # so that writing begins at all
    fill()
    with pytest.raises(NotEnoughDisk, match=told(disk / "checkpoints")):
        save_checkpoint(disk / "checkpoints", 1, {"a": {"b": "c" * 100_000}}, {}, {})
    assert not list((disk / "checkpoints").glob("*"))


def test_a_disk_without_inodes_is_called_that(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(1, nr_inodes=3)
    with pytest.raises(NotEnoughDisk, match=r"1 MiB are free, but no entry for another file \(inodes\)"):
        for number in range(4):
            write_text(disk / f"{number}.json", "{}")


def test_a_folder_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path}: cannot write there .*; let its owner do it") as raised:
        exclusive(tmp_path / ".lock", lambda: "busy")
    assert raised.value.strerror
