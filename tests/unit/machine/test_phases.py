"""What is seen of a job's phases: lines where there is no terminal, nothing with TQDM_DISABLE, and the times."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

import sae_training
from sae_training.machine import phases
from sae_training.machine.phases import Lines, Phases, counted_phases, phase, progress_bar, shown

ROOT = Path(sae_training.__file__).parent.parent

# A bar that is updated every tenth of a second for 2.6 seconds.
SCRIPT = """
import sys, time
from sae_training.machine.phases import progress_bar, phase
with phase("working", has_bar="line" not in sys.argv), progress_bar("counting", 26, "steps") as bar:
    for _ in range(26):
        time.sleep(0.1)
        if "line" not in sys.argv:
            bar.update(1)
"""


def stderr_of(*arguments: str, terminal: bool = False, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-c", SCRIPT, *arguments]
    if not terminal:
        return subprocess.run(words, env=variables, stderr=subprocess.PIPE, text=True, check=True).stderr
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    process = subprocess.Popen(words, env=variables, stderr=follower)
    os.close(follower)
    said = b""
    try:
        while part := os.read(leader, 4096):
            said += part
    except OSError:  # how the end of a terminal reads
        pass
    os.close(leader)
    assert process.wait() == 0
    return said.decode()


def test_log_file_gets_a_line_after_two_seconds_and_one_at_the_end() -> None:
    lines = stderr_of().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"counting:  ?\d+% of 26\.0 steps, .* steps/s, 00:02, 00:00 left", lines[0])
    assert re.fullmatch(r"counting: 100% of 26\.0 steps, .* steps/s, 00:02", lines[1])


def test_terminal_gets_a_bar() -> None:
    said = stderr_of(terminal=True)
    assert "\r" in said
    assert "counting" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_tqdm_disable_turns_bars_and_lines_off(terminal: bool) -> None:
    assert stderr_of(terminal=terminal, TQDM_DISABLE="1") == ""
    assert stderr_of("line", terminal=terminal, TQDM_DISABLE="1") == ""


def test_phase_without_a_bar_is_said_after_two_seconds() -> None:
    assert stderr_of("line").splitlines()[0] == "working ..."


@pytest.mark.parametrize("terminal", [False, True])
def test_phase_without_a_bar_is_said_again_where_there_are_no_bars(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two waits pass at once, the third finds the phase ended."""
    waits: list[float] = []

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return len(waits) > 2

    monkeypatch.setattr(phases, "shows_bars", lambda: terminal)
    phases.say_until("working", Ended())
    said = capsys.readouterr().err.splitlines()
    assert said == (["working ..."] if terminal else ["working ...", "working ... 00:00"])
    assert waits == [phases.SHOWN_AFTER, phases.LINE_EVERY, phases.LINE_EVERY][: 1 if terminal else 3]


@pytest.mark.parametrize(("value", "off"), [("1", True), ("true", True), ("0", False), ("", False), ("False", False)])
def test_values_of_tqdm_disable(value: str, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert phases.is_turned_off() == off


def test_short_phase_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("short"), progress_bar("short", 1, "steps") as bar:
        bar.update(1)
    assert capsys.readouterr().err == ""


def test_lines_come_every_thirty_seconds_and_name_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("training", 4000, "tok", initial=1000)
    lines.set_postfix_str("loss 0.1")
    for seconds in (1, 2, 15, 10, 10, 20):  # that pass before each update: at 1, 3, 18, 28, 38, 58
        lines.started -= seconds
        lines.next_line -= seconds
        lines.update(100)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == ["training:  30% of 4.00k tok", "training:  38% of 4.00k tok"]
    assert [line.split(", ")[2:] for line in said] == [
        ["00:03", "00:42 left", "loss 0.1"],
        ["00:38", "03:10 left", "loss 0.1"],
    ]


def test_phase_within_another_counts_for_itself_alone() -> None:
    with counted_phases() as times:
        with phase("outer"), phase("inner"):
            assert times.open == ["outer", "inner"]
        assert list(times.seconds) == ["other", "outer", "inner"]
        with counted_phases() as again:
            assert again is times
    assert times.open == []
    assert phases.COUNTED == []


def test_phase_in_a_thread_counts_nowhere() -> None:
    with counted_phases() as times:

        def work() -> None:
            with phase("elsewhere"):
                pass

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "elsewhere" not in times.seconds


def test_line_of_times_leaves_out_what_took_no_time() -> None:
    times = Phases()
    times.seconds = {"other": 1.0, "reading": 2.04, "saving": 0.01, "training": 3600.0}
    times.open = ["saving"]
    assert times.line() == "Time: reading 2.0 s, training 1:00:00, other 1.0 s; 1:00:03 in all."
    assert shown(99.94) == "99.9 s"
