"""`scripts/gpu_check.py`: a dry run of all its parts on the CPU, and what becomes of parts that crash or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import gpu_check

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the JSON of all parts at tiny sizes on the CPU."""
    folder = tmp_path_factory.mktemp("gpu-check")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--cpu", f"--out={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "gpu_check.log").read_text()
    return folder, json.loads((folder / "gpu_check.json").read_text())


HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_SPARSIFY = importlib.util.find_spec("sparsify") is not None


@pytest.mark.slow
def test_dry_run_does_every_part_that_a_cpu_can(dry_run: tuple[Path, dict[str, Any]]) -> None:
    parts = dry_run[1]["parts"]
    assert list(parts) == list(gpu_check.PARTS)
    states = {name: part["state"] for name, part in parts.items()}
    assert states.pop("kernels") == ("done" if HAS_TRITON else "skipped")
    assert states.pop("tests") == "skipped"  # all of them need a GPU
    assert states.pop("sparsify") == ("done" if HAS_SPARSIFY else "partly skipped")
    assert set(states.values()) == {"done"}


@pytest.mark.slow
def test_skipped_item_has_its_reason(dry_run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = dry_run
    skipped = [item for part in result["parts"].values() for item in part["items"] if item["state"] == "skipped"]
    assert all(item["reason"] for item in skipped)
    reasons = {item.get("what"): item["reason"] for item in skipped}
    assert reasons["others marked gpu"].startswith("no test ran")
    if not HAS_SPARSIFY:
        assert "No module named" in reasons["eai-sparsify topk-adam"]
    table = (folder / "gpu_check.md").read_text()
    assert all(f"| {what} | skipped |" in table for what in reasons)


@pytest.mark.slow
def test_steps_are_timed_against_the_encoder_product(dry_run: tuple[Path, dict[str, Any]]) -> None:
    for size in ("768", "4096"):
        items = {item["what"]: item["figures"] for item in dry_run[1]["parts"][f"steps-{size}"]["items"]}
        assert items["topk sparse"]["sparse"]
        assert items["topk sparse"]["l0"] == items["topk dense"]["l0"] == items["topk sparse"]["k"]
        floor = items["encoder product bfloat16"]["ms"]
        for name in ("topk sparse", "batchtopk dense", "standard dense bfloat16"):
            assert items[name]["over_encoder"] == pytest.approx(items[name]["ms"] / floor, rel=0.05)


def check_of(tmp_path: Path, *words: str) -> gpu_check.Check:
    return gpu_check.Check(gpu_check.parse([f"--out={tmp_path}", "--cpu", *words]))


def test_items_before_a_crash_and_after_it_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_of(tmp_path)
    replies = {
        "0": '{"what": "a", "state": "running"}\n{"what": "a", "state": "done", "figures": {}}\n'
        '{"what": "b", "state": "running"}\n',  # and it dies
        "2": '{"what": "c", "state": "running"}\n{"what": "c", "state": "done", "figures": {"ms": 1.5}}\n',
    }
    script = f"import sys; print({replies!r}[sys.argv[-2]], end=''); sys.exit(sys.argv[-2] == '0')"
    popen = subprocess.Popen

    def instead(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", script, *command[-2:]], **options)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", instead)
    check.run("kernels")
    saved = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["kernels"]
    assert [item["state"] for item in saved["items"]] == ["done", "failed", "done"]
    assert saved["state"] == "failed"
    assert "| kernels | c | done | ms 1.5 |" in (tmp_path / "gpu_check.md").read_text()


def test_part_is_stopped_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_of(tmp_path)
    hanging = 'print(\'{"what": "a", "state": "running"}\', flush=True); import time; time.sleep(60)'
    popen = subprocess.Popen
    monkeypatch.setattr(
        gpu_check.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", hanging], **options)
    )
    monkeypatch.setitem(gpu_check.PARTS, "kernels", 1)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0)
    check.run("kernels")
    assert check.parts["kernels"]["state"] == check.parts["kernels"]["items"][0]["state"] == "timed out"
    assert check.parts["kernels"]["seconds"] < 30


def test_part_that_the_budget_has_no_time_for_is_skipped(tmp_path: Path) -> None:
    check = check_of(tmp_path, "--minutes=0.01")
    check.run("kernels")
    assert (check.parts["kernels"]["state"], check.parts["kernels"]["items"]) == ("skipped", [])
    assert "| kernels |  | skipped | no time was left for it |" in (tmp_path / "gpu_check.md").read_text()


def test_wheels_are_unpacked_into_folders_to_import_from(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing.py", "value = 3\n")
        wheel.writestr("thing-1.0.data/purelib/other.py", "value = 4\n")
    paths = gpu_check.unpacked(tmp_path)
    assert [Path(path, file).is_file() for path, file in zip(paths, ("thing.py", "other.py"), strict=True)] == [
        True
    ] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([f"--out={tmp_path}", "--only", "device", "kernels"]) == 1
    assert "no CUDA device" in (tmp_path / "gpu_check.md").read_text()
    assert "1 skipped" in capsys.readouterr().out
