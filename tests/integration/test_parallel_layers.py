"""Autoencoders dealt out to processes under torchrun: the same bytes as from one process, whatever stops them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import Command
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
    folder.mkdir(exist_ok=True)
    file = folder / "run.json"
    file.write_text(json.dumps({**RUN, "parallel": "layers", "run_dir": str(folder), **changes}))
    return ["train", "--config", str(file)]


def torchrun(n: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    return subprocess.Popen(
        [*command, "-m", "sae_training", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ranks(
    n: int, folder: Path, *words: str, of_second: Sequence[str] = (), started: Sequence[int] | None = None
) -> list[Command]:
    """Processes as torchrun starts them, without the seconds that each of them imports the package for."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    commands = [of_second if r == 1 and of_second else words for r in range(n)]
    return [
        Command(folder, *commands[r], environment=job | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in (range(n) if started is None else started)
    ]


def files_of(run: Path) -> dict[str, bytes]:
    """What a run leaves that does not tell the time, nor its own place."""
    names = ("metrics.jsonl", "sae.safetensors", "evaluation.json", "log_feature_sparsity.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(arguments(folder)) == 0
    return files_of(folder / "run")


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(alone: dict[str, bytes], tmp_path: Path) -> None:
    process = torchrun(2, *arguments(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert files_of(tmp_path / "run") == alone
    assert out.count("Run folder:") == 1  # one of them speaks
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "codes", "words", "n_after"),
    [
        (signal.SIGKILL, [1, -9], "error: rank 0: another process of the job has ended", 3),
        (signal.SIGTERM, [143, 143], "Stopped by SIGTERM after step", 1),
    ],
)
def test_a_stopped_job_goes_on_with_any_number_of_processes(
    number: signal.Signals, codes: list[int], words: str, n_after: int, alone: dict[str, bytes], tmp_path: Path
) -> None:
    job = ranks(2, tmp_path, *arguments(tmp_path))
    run = tmp_path / "run"
    while not (run / "checkpoints" / "step_3" / "manifest.json").is_file():
        assert job[0].poll() is None, job[0].communicate()
        time.sleep(0.05)
    job[1].send_signal(number)
    said = [process.communicate(timeout=60)[1] for process in job]
    assert [process.returncode for process in job] == codes, said
    assert words in said[0] and "Traceback" not in said[0]
    assert not (run / "final").exists()
    for process in ranks(n_after, tmp_path, "resume", str(run)):
        _, err = process.communicate()
        assert process.returncode == 0, err
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


def test_autoencoders_are_dealt_out_by_their_cost() -> None:
    costs = {"a": 1.0, "b": 8.0, "c": 4.0, "d": 4.0, "e": 1.0}
    assert shared_out(costs, 2) == [["a", "b"], ["c", "d", "e"]]
    assert shared_out(costs, 1) == [list(costs)]
    assert sorted(sum(shared_out(costs, 5), [])) == list(costs)
    with pytest.raises(ValueError, match="found 6 ranks for 5 autoencoders"):
        shared_out(costs, 6)
