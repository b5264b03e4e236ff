from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sae_training.machine import holder
from sae_training.machine.holder import Heartbeat, holder_of, read_holder, this_process, write_holder

SINCE = "2026-01-31T12:00:00Z"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def wait_for(life: str, pid: int) -> None:
    while holder.process(pid)[1] != life:
        time.sleep(0.01)


def test_a_process_lives_is_stopped_and_is_dead_before_anybody_asks_how_it_ended(
    process: subprocess.Popen[bytes],
) -> None:
    found = holder_of(process.pid, SINCE)
    assert found.life() == "alive"
    process.send_signal(signal.SIGSTOP)
    wait_for("stopped", process.pid)
    assert found.life() == "stopped"
    process.kill()
    wait_for("dead", process.pid)
    assert (found.life(), holder_of(process.pid, SINCE).pid) == ("dead", process.pid)
    process.wait()
    assert found.life() == "dead"


def test_another_process_of_the_same_number_is_not_it(process: subprocess.Popen[bytes]) -> None:
    found = holder_of(process.pid, SINCE)
    assert replace(found, start=found.start - 1).life() == "dead"


def test_here_no_clock_decides_and_elsewhere_only_the_heartbeat(tmp_path: Path) -> None:
    write_holder(tmp_path, this_process(SINCE))
    day = 86_400
    for back, of_another in ((day, "dead"), (-day, "alive"), (holder.BEAT_LOST_AFTER / 2, "alive")):
        os.utime(tmp_path / ".holder.json", (time.time() - back, time.time() - back))
        found = read_holder(tmp_path)
        assert found is not None
        assert (found.since, found.is_here, found.life()) == (SINCE, True, "alive")
        assert replace(found, machine="another", start=0).life() == of_another


def test_a_heart_beats_until_it_is_stopped_and_whatever_becomes_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "BEAT_EVERY", 0.01)
    file = tmp_path / "file"
    file.touch()
    os.utime(file, (0, 0))
    heart = Heartbeat(file)
    while file.stat().st_mtime == 0:
        time.sleep(0.01)
    file.unlink()
    time.sleep(0.05)
    file.touch()
    os.utime(file, (0, 0))
    while file.stat().st_mtime == 0:
        time.sleep(0.01)
    heart.stop()


@pytest.mark.parametrize("content", ["", "[]", "null", json.dumps({"pid": 1, "host": "of an earlier version"})])
def test_a_file_that_says_nothing_names_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / ".holder.json").write_text(content)
    assert read_holder(tmp_path) is None


def test_the_terminal_of_tmux_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,123,0")
    monkeypatch.setenv("TMUX_PANE", "%4")
    assert this_process(SINCE).tmux == ("/tmp/tmux-0/default", "%4")
    monkeypatch.delenv("TMUX")
    assert this_process(SINCE).tmux is None
