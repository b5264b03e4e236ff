"""Jobs of several processes, in the ways that tests start, stop and compare them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import Command, Main
from ranks import free_port

from sae_training import cli


def train(fields: Mapping[str, Any], folder: Path) -> list[str]:
    """The words that train a run of these fields in `folder`."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.json"
    file.write_text(json.dumps({"run_dir": str(folder), **fields}))
    return ["train", "--config", str(file)]


def torchrun(n: int, *words: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *options]
    return subprocess.Popen(
        [*command, "-m", "sae_training", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ranks(
    n: int,
    folder: Path,
    *words: str,
    of_second: Sequence[str] = (),
    started: Sequence[int] | None = None,
    main: Main = cli.main,
) -> list[Command]:
    """Processes as torchrun starts them, without the seconds that each of them imports the package for."""
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    commands = [of_second if r == 1 and of_second else words for r in range(n)]
    return [
        Command(folder, *commands[r], environment=job | {"RANK": str(r), "LOCAL_RANK": str(r)}, main=main)
        for r in (range(n) if started is None else started)
    ]


def files_of(run: Path) -> dict[str, bytes]:
    """What a run leaves that does not tell the time, nor its own place."""
    names = ("metrics.jsonl", "sae.safetensors", "evaluation.json", "log_feature_sparsity.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.name in names}


def run_by_torchrun(n: int, folder: Path, *words: str) -> Path:
    """The run in `folder` that `n` processes have made, of which one spoke."""
    process = torchrun(n, *words)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("Run folder:") == 1
    return folder / "run"


def all_end_well(job: Sequence[Command]) -> None:
    said = [process.communicate()[1] for process in job]
    assert [process.returncode for process in job] == [0] * len(job), said


def stopped_after_a_checkpoint(number: signal.Signals, folder: Path, *words: str) -> tuple[Path, str]:
    """The unfinished run of two processes, of which the second got a signal, and what the first said."""
    job, run = ranks(2, folder, *words), folder / "run"
    while not (run / "checkpoints" / "step_3" / "manifest.json").is_file():
        assert job[0].poll() is None, job[0].communicate()
        time.sleep(0.05)
    job[1].send_signal(number)
    said = [process.communicate(timeout=120)[1] for process in job]
    assert [process.returncode for process in job] == ([1, -9] if number == signal.SIGKILL else [143, 143]), said
    assert not (run / "final").exists()
    assert "Stopped" not in said[1]  # the first one says it
    return run, said[0]


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same_run(found: Path, expected: Path) -> None:
    """The same rows of the log, up to the order of sums."""
    rows, expected_rows = metrics_of(found), metrics_of(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for key, value in expected_row.items():
            if isinstance(value, dict):
                assert row[key]["counts"] == value["counts"]
            else:
                assert row[key] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), key
