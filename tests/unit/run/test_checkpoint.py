from __future__ import annotations

import hashlib
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
import torch
import torch.distributed as dist
from ranks import on_ranks

import sae_training
from sae_training.machine.files import NotEnoughDisk
from sae_training.parallel.ranks import CONTROL, rank, wait_for_all
from sae_training.run import checkpoint
from sae_training.run.checkpoint import (
    complete_checkpoints,
    delete_old,
    newest_valid,
    own_share,
    read_part,
    read_state,
    save_checkpoint,
    verify,
)

FILES = ("sae.safetensors", "state.json", "trainer.safetensors")


def small_parts(step: int = 0) -> dict[str, dict[str, Any]]:
    return {"sae": {"W": torch.full((2, 3), float(step))}, "trainer": {"moments": {"m": torch.arange(4.0) + step}}}


def save(parent: Path, step: int) -> Path:
    return save_checkpoint(parent, step, small_parts(step), {"metrics_bytes": 10 * step}, {"cfg.json": "{}\n"})


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def all_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All parts that were saved, and the state."""
    state = read_state(folder)
    return {file.stem: read_part(folder, file.stem) for file in folder.glob("*.safetensors")}, state


# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_tensor_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 100, 0]]).to(dtype)
    load, _ = all_of(save_checkpoint(tmp_path, 1, {"part": {"t": tensor}}, {}, {}))
    assert load["part"]["t"].dtype == dtype
    assert torch.equal(load["part"]["t"], tensor)


def test_not_a_number_and_the_sign_of_zero_come_back(tmp_path: Path) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0])
    parts, _ = all_of(save_checkpoint(tmp_path, 1, {"part": {"t": tensor}}, {}, {}))
    assert parts["part"]["t"].view(torch.int32).tolist() == tensor.view(torch.int32).tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()])
def test_empty_and_scalar_tensors_keep_their_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    parts, _ = all_of(save_checkpoint(tmp_path, 1, {"part": {"t": torch.zeros(shape)}}, {}, {}))
    assert parts["part"]["t"].shape == shape


def test_nested_dicts_come_back_as_they_were(tmp_path: Path) -> None:
    stream = {"row": 3, "offset": 0, "stream": {"shard": None, "seen": [1, 2]}}
    content = {"served": 64, "tokens": {"place": stream, "pending": torch.tensor([5, 6])}, "nothing": {}, "name": "ä"}
    parts, state = all_of(save_checkpoint(tmp_path, 7, {"store": content}, {"metrics_bytes": 12}, {}))
    assert torch.equal(parts["store"]["tokens"].pop("pending"), content["tokens"].pop("pending"))
    assert parts["store"] == content
    assert state == {"step": 7, "metrics_bytes": 12}


def test_parts_without_tensors_and_without_values_come_back(tmp_path: Path) -> None:
    parts, _ = all_of(save_checkpoint(tmp_path, 1, {"empty": {}, "values": {"a": 1.5}}, {}, {}))
    assert parts == {"empty": {}, "values": {"a": 1.5}}


def test_views_of_one_storage_come_back_as_themselves(tmp_path: Path) -> None:
    # The firing counters are rows of one tensor, and the transposed one is not contiguous.
    counters = torch.arange(6).reshape(2, 3)
    parts, _ = all_of(
        save_checkpoint(tmp_path, 1, {"part": {"a": counters[0], "b": counters[1]}, "t": {"t": counters.T}}, {}, {})
    )
    assert parts["part"]["a"].tolist() == [0, 1, 2]
    assert parts["part"]["b"].tolist() == [3, 4, 5]
    assert parts["t"]["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_extra_files_are_written_and_guarded(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert (folder / "cfg.json").read_text() == "{}\n"
    assert "cfg.json" in json.loads((folder / "manifest.json").read_text())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"old": {"t": torch.zeros(1)}}, {}, {})
    parts, _ = all_of(save(tmp_path, 3))
    assert sorted(parts) == ["sae", "trainer"]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


# ------------------------------------------------------------------------------------------------------ which ones
# count


def test_newest_is_first_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 10):
        save(tmp_path, step)
    assert names(complete_checkpoints(tmp_path)) == ["step_100", "step_10", "step_9"]


def test_half_written_folders_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "step_5", tmp_path / "step_9.tmp")
    (tmp_path / "step_7").mkdir()  # no manifest
    assert names(complete_checkpoints(tmp_path)) == ["step_5"]


def test_no_folder_at_all_has_no_checkpoints(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "checkpoints", notify=print) is None


def test_half_written_folder_of_the_same_step_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "step_9.tmp").mkdir()
    (tmp_path / "step_9.tmp" / "rest of a killed run").write_text("x")
    folder = save(tmp_path, 9)
    verify(folder)
    assert not (folder / "rest of a killed run").exists()
    assert not (tmp_path / "step_9.tmp").exists()


def test_delete_old_keeps_the_newest_and_clears_half_written_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    (tmp_path / "step_11.tmp").mkdir()
    delete_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_3"]


def test_checkpoint_saved_after_a_damaged_newer_one_was_passed_over_is_kept(tmp_path: Path) -> None:
    # A run goes back from the damaged step 6 to step 3 and saves step 4, keeping one.
    save(tmp_path, 3)
    os.truncate(save(tmp_path, 6) / "sae.safetensors", 10)
    assert newest_valid(tmp_path, notify=lambda message: None) == tmp_path / "step_3"
    save(tmp_path, 4)
    delete_old(tmp_path, keep=1)
    found = newest_valid(tmp_path, notify=lambda message: None)
    assert found == tmp_path / "step_4"


# -------------------------------------------------------------------------------------------------------------- damage


def test_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "trainer.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=f"trainer.safetensors: found {size - 1} bytes, expected {size} bytes"):
        verify(tmp_path / "step_1")


@pytest.mark.parametrize("tenth", range(10))
def test_a_copy_that_broke_off_anywhere_is_set_aside(tmp_path: Path, tenth: int) -> None:
    kept, folder = save(tmp_path, 1), save(tmp_path, 2)
    files = sorted(folder.iterdir())
    left = sum(file.stat().st_size for file in files) * tenth // 10
    for file in files:  # as a copy writes them, one after another: the rest is not there
        size = file.stat().st_size
        os.truncate(file, min(left, size)) if left > 0 else file.unlink()
        left -= size
    said: list[str] = []
    assert newest_valid(tmp_path, notify=said.append) == kept
    has_manifest = (tmp_path / "step_2.damaged").exists()
    assert len(said) == has_manifest and (has_manifest or "manifest.json" not in names([*folder.iterdir()]))


def test_flipped_bit_in_any_file_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for name in ("sae.safetensors", "trainer.safetensors", "state.json", "cfg.json"):
        content = (folder / name).read_bytes()
        damaged = bytearray(content)
        damaged[-1] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: its content is not what was written"):
            verify(folder)
        (folder / name).write_bytes(content)


def test_missing_file_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").unlink()
    with pytest.raises(ValueError, match="state.json: found no such file, expected"):
        verify(folder)


def test_missing_manifest_means_never_finished(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="step_1: no manifest.json, so this checkpoint was never finished"):
        verify(folder)


@pytest.mark.parametrize("length", [0, 1, 40, 100])
def test_truncated_manifest_is_named(tmp_path: Path, length: int) -> None:
    folder = save(tmp_path, 1)
    os.truncate(folder / "manifest.json", length)
    with pytest.raises(ValueError, match="manifest.json: not a readable manifest.*this checkpoint is damaged"):
        verify(folder)


@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_anywhere_in_the_manifest_is_a_named_error(tmp_path: Path, bit: int) -> None:
    # Blanks may change without harm; every other place must be found, and by an error that names the checkpoint.
    folder = save(tmp_path, 1)
    content = (folder / "manifest.json").read_bytes()
    wrong = {}
    for place, byte in enumerate(content):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        if not chr(byte).isspace():
            (folder / "manifest.json").write_bytes(damaged)
            try:
                verify(folder)
                wrong[place] = "passed"
            except Exception as error:
                if not isinstance(error, ValueError) or str(folder) not in str(error):
                    wrong[place] = repr(error)
    assert not wrong, sorted(set(wrong.values()))


def test_newest_valid_passes_over_damaged_ones_and_says_which(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.truncate(save(tmp_path, 2) / "state.json", 3)
    (save(tmp_path, 3) / "sae.safetensors").unlink()
    said: list[str] = []
    assert newest_valid(tmp_path, notify=said.append) == tmp_path / "step_1"
    assert len(said) == 2
    assert "step_3/sae.safetensors: found no such file" in said[0]
    assert "step_2/state.json: found 3 bytes" in said[1]


def found_by_two(parent: Path) -> dict[str, tuple[Path | None, list[str], bool]]:
    """Damage each file of a checkpoint in turn; return what is found then, what is said, and if this rank read it."""
    CONTROL.append(dist.new_group(backend="gloo"))
    found = {}
    for name in FILES:
        for step in (1, 2):
            save_checkpoint(parent, step, small_parts(step) if rank() == 1 else {}, {}, {})
        path = parent / "step_2" / name
        expected = json.loads((parent / "step_2" / "manifest.json").read_text())
        assert expected[name] == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        wait_for_all()
        if rank() == 0:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        wait_for_all()
        is_own = name in own_share({file: entry["bytes"] for file, entry in expected.items()})
        said: list[str] = []
        found[name] = newest_valid(parent, said.append), said, is_own
    return found


def test_damage_is_found_whichever_process_reads_the_file(tmp_path: Path) -> None:
    first, second = on_ranks(2, found_by_two, tmp_path)
    for name in FILES:
        assert first[name][0] == second[name][0] == tmp_path / "step_1"
        (said,) = first[name][1]
        assert f"{tmp_path / 'step_2' / name}: its content is not what was written" in said
        assert second[name][1] == []
        assert first[name][2] != second[name][2]
    assert len({first[name][2] for name in FILES}) == 2


# ---------------------------------------------------------------------------------------------------------------- kills


def killed_at(event_number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that kills itself at its `event_number`-th file operation; False if it did not get there."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"):
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def kill_everywhere(folder: Path, work: Callable[[], object], check: Callable[[], None]) -> int:
    """`check` what each kill of `work` at one of its file operations leaves of `folder`; the number of kills."""
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    n = 1
    while killed_at(n, work):
        check()
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        n += 1
    return n - 1


def test_kill_at_any_moment_of_a_save_leaves_only_sound_checkpoints(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    save(parent, 1)

    def check() -> None:
        found = complete_checkpoints(parent)
        assert names(found)[-1] == "step_1"
        for folder in found:
            verify(folder)

    assert kill_everywhere(parent, lambda: save(parent, 2), check) > 10


def test_kill_at_any_moment_of_clearing_leaves_only_sound_checkpoints(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    save(parent, 1)
    save(parent, 2)

    def check() -> None:
        assert names(complete_checkpoints(parent))[0] == "step_2"
        for folder in complete_checkpoints(parent):
            verify(folder)

    assert kill_everywhere(parent, lambda: delete_old(parent, keep=1), check) > 5


SAVE_IN_A_LOOP = """
import sys
from pathlib import Path
import torch
from sae_training.run.checkpoint import save_checkpoint

first = int(sys.argv[2])
for step in range(first, first + 10_000):
    parts = {"sae": {"W": torch.full((512, 1024), float(step))}, "store": {"served": step}}
    save_checkpoint(Path(sys.argv[1]), step, parts, {"metrics_bytes": step}, {})
    print(step, flush=True)
"""


def test_process_killed_while_it_saves_leaves_only_sound_checkpoints(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(sae_training.__file__).parent.parent)}
    waits = random.Random(0)
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_IN_A_LOOP, str(tmp_path), str(1 + 100 * attempt)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        last_saved = int(process.stdout.readline())
        time.sleep(waits.uniform(0, 0.1))
        process.kill()
        process.wait()
        process.stdout.close()
        found = complete_checkpoints(tmp_path)
        assert int(found[0].name.removeprefix("step_")) >= last_saved
        for folder in found:
            parts, state = all_of(folder)
            assert parts["store"]["served"] == state["step"] == parts["sae"]["W"][0, 0].item()


# ----------------------------------------------------------------------------------------------------------------- disk


def test_full_disk_is_told_before_anything_is_written(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(1)
    # 8 MiB of weights and 16 MiB to spare
    parts = {"sae": {"W": torch.zeros(2, 2**20)}}
    with pytest.raises(NotEnoughDisk, match="checkpoints: a checkpoint needs 24 MiB, but 1 MiB are free"):
        save_checkpoint(disk / "checkpoints", 1, parts, {}, {})
    assert list(disk.iterdir()) == []


def test_without_room_the_oldest_checkpoints_go_and_the_newest_stays(
    small_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)
    monkeypatch.setattr("sae_training.machine.files.SPARE_BYTES", 0)
    disk = small_disk(4)
    parts = {"sae": {"W": torch.zeros(300, 2**10)}}  # 1.2 MB: three fit, four do not
    for step in (1, 2, 3, 4):
        save_checkpoint(disk, step, parts, {}, {})
    assert names(complete_checkpoints(disk)) == ["step_4", "step_3", "step_2"]
    with pytest.raises(NotEnoughDisk, match="a checkpoint needs 4 MiB, but 0 MiB are free"):
        save_checkpoint(disk, 5, {"sae": {"W": torch.zeros(1000, 2**10)}}, {}, {})
    assert names(complete_checkpoints(disk)) == ["step_4", "step_3", "step_2"]  # deleting all but one is not enough


def test_disk_that_fills_up_while_saving_leaves_nothing_half_written(
    small_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(1)
    # Another program takes the last space between the check and the writing. The runner goes on after an OSError.
    monkeypatch.setattr(checkpoint, "check_free_disk", lambda folder, n_bytes: None)
    with pytest.raises(OSError, match="(?i)no space left"):
        save_checkpoint(disk, 1, {"sae": {"W": torch.zeros(2, 2**20)}}, {}, {})
    assert list(disk.iterdir()) == []


def test_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(
    small_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(1)
    monkeypatch.setattr(checkpoint, "check_free_disk", lambda folder, n_bytes: None)
    save(disk, 1)
    with pytest.raises(Exception, match="(?i)no space left"):
        save_checkpoint(disk, 2, {"sae": {"W": torch.zeros(2, 2**20)}}, {}, {})
    assert newest_valid(disk, notify=print) == disk / "step_1"
