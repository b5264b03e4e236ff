"""Jobs that need no terminal, as people start and stop them: in tmux, on a server of the test's own, and without."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import SMALL_RUN

from sae_training import cli
from sae_training.jobs.detach import in_tmux
from sae_training.jobs.found import jobs_in

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux on this machine")

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Say]:
    """Runs a command in a folder of the test's own; returns exit code, stdout and stderr. No job outlives the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        return code, *capfd.readouterr()

    yield run
    for job in jobs_in(Path("runs")):
        if job.is_live and job.holder is not None:
            os.kill(job.holder.pid, signal.SIGKILL)


def config(name: str, **changes: Any) -> str:
    """The file of a run that does not come to its end in a test."""
    file = Path(f"{len(list(Path().glob('*.json')))}.json")
    file.write_text(json.dumps({**SMALL_RUN, "run_name": name, "total_training_tokens": 64_000_000, **changes}))
    return str(file)


def listed(say: Say) -> dict[str, Any]:
    """The only run that `runs --json` lists."""
    code, out, _ = say("runs", "--json")
    (job,) = json.loads(out)
    assert code == 0
    return job


@pytest.mark.slow
@needs_tmux
def test_a_run_in_tmux_is_listed_stopped_resumed_killed_and_removed(tmux: None, say: Say) -> None:
    code, out, err = say("train", "--config", config("a.b:c"), "--detach")
    assert code == 0, err
    assert "in the tmux session a_b_c" in out  # tmux forbids . and :
    sessions = subprocess.run(["tmux", "ls", "-F", "#{session_name} #{pane_pid}"], capture_output=True, text=True)
    job = listed(say)
    assert sessions.stdout.split() == ["a_b_c", str(job["pid"])]
    assert (job["kind"], job["name"], job["state"], job["total_steps"]) == ("train", "a.b:c", "training", 1_000_000)
    code, _, err = say("train", "--config", config("a.b:c"), "--detach")
    assert (code, f"process {job['pid']} on" in err) == (1, True), err
    code, _, err = say("rm", "a.b:c", "--yes")
    assert (code, "is at work; stop it first" in err) == (1, True), err

    code, out, err = say("stop", "runs/a.b:c/")
    assert (code, out[:23]) == (0, "a.b:c: interrupted afte"), err
    job = listed(say)
    assert (job["state"], job["eta_s"], Path(f"runs/a.b:c/checkpoints/step_{job['step']}").is_dir()) == (
        "interrupted",
        None,
        True,
    )
    assert say("stop", "a.b:c")[1].startswith("a.b:c: is not running, but interrupted")

    code, _, err = say("resume", "a.b:c", "--detach")
    assert (code, f"Continuing runs/a.b:c after step {job['step']}" in err) == (0, True), err
    pid = listed(say)["pid"]
    os.kill(pid, signal.SIGKILL)
    while listed(say)["state"] == "training":
        time.sleep(0.1)
    job = listed(say)
    assert (job["state"], job["pid"]) == ("lost", pid)

    code, log, _ = say("logs", "a.b:c", "-f")  # comes to its end, as the run has
    assert code == 0
    assert [line.split("] ")[1].split()[1] for line in log.splitlines() if ", process " in line] == ["train", "resume"]
    assert "Stopped by SIGTERM after step" in log
    assert "\r" not in log
    code, _, err = say("rm", "a.b:c", "--yes")
    assert code == 0, err
    assert [path.name for path in Path("runs").iterdir()] == [".detached"]
    assert [path.name for path in Path("runs/.detached").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_run_that_cannot_start_says_why_without_tmux_too(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = say("train", "--config", config("wide", d_in=7), "--detach")
    assert (code, out) == (1, "")
    assert "error: d_in: got 7" in err
    assert "wide: did not start; what it said is above" in err
    assert say("runs")[1] == "There are no runs in runs.\n"


def test_what_is_wrong_with_a_command_is_said_at_once(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = say("train", "demo", "demo", "--k", "0", "--device", "cpu", "--detach")
    assert code == 1
    assert "k: " in err
    assert not Path("runs").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = say("pretokenize", "demo", "demo", "out", "--detach")
    assert (code, "start torchrun itself in tmux" in err) == (1, True)


@needs_tmux
def test_a_name_that_tmux_has_already_gets_a_number(tmux: None, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command = ["sh", "-c", 'echo "$0" > "$1"; sleep 100', "two words", str(tmp_path / "a file")]
    assert in_tmux("a.b:c", command) == ("a_b_c", "")
    assert in_tmux(f"a.b#(touch {marker})", ["true"])[0] is not None
    assert in_tmux("a_b_c", command) == ("a_b_c-2", "")
    while not (tmp_path / "a file").exists() or not (tmp_path / "a file").read_text():
        time.sleep(0.05)
    assert (tmp_path / "a file").read_text() == "two words\n"
    assert not marker.exists()
