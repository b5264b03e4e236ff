from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from sae_training.machine import log

ROOT = Path(__file__).parents[3]
SAYS = """
import subprocess, sys, time
from pathlib import Path
from tqdm import tqdm
from sae_training.machine import log
log.KEPT_EVERY = float(sys.argv[2])
with log.told_to_log(["train", "a b"]):
    print("one")
    log.keep_in(Path(sys.argv[1]))
    subprocess.run(["echo", "two"])
    for _ in tqdm(range(3), desc="bar", mininterval=0):
        pass
    tqdm.write("three", file=sys.stderr)
    print("a\\rb\\rc")
    print("no end", end="")
"""


def said(ticket: Path, folder: Path, kept_every: float = 1000, terminal: int | None = None) -> list[str]:
    """What a process has said: the lines of its log."""
    for path in (ticket, folder):
        path.mkdir(exist_ok=True)
    process = subprocess.run(
        [sys.executable, "-c", SAYS, str(folder), str(kept_every)],
        env=os.environ | {log.TICKET: str(ticket), "PYTHONPATH": str(ROOT), "TQDM_MININTERVAL": "0"},
        stdout=terminal, stderr=terminal,
    )  # fmt: skip
    assert process.returncode == 0
    assert not (ticket / "run.log").exists()
    return (folder / "run.log").read_text(encoding="utf-8").splitlines()


def test_a_log_has_the_lines_that_stay_and_moves_with_the_job(tmp_path: Path) -> None:
    first, *others = said(tmp_path / "ticket", tmp_path / "run")
    assert first.endswith("] train 'a b'")
    assert [line for line in others if "bar" not in line] == ["one", "two", "three", "c", "no end"]
    assert [line for line in others if "bar" in line][0].startswith("bar: 100%")
    again = said(tmp_path / "ticket", tmp_path / "run")
    assert again[: 1 + len(others)] == [first, *others]
    assert len(again) == 2 * (1 + len(others))


def test_of_a_line_that_is_written_over_one_is_kept_from_time_to_time(tmp_path: Path) -> None:
    lines = said(tmp_path / "ticket", tmp_path / "run", kept_every=0)
    assert lines[-4:] == ["a", "b", "c", "no end"]
    assert sum(line.startswith("bar:") for line in lines) > 1


@pytest.mark.parametrize("state", ["open", "closed", "stopped"])
def test_a_terminal_shows_all_and_may_go_away_or_stop(state: str, tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    if state == "closed":
        os.close(ours)
    if state == "stopped":
        termios.tcflow(terminal, termios.TCOOFF)  # as Ctrl-S does
    lines = said(tmp_path / "ticket", tmp_path / "run", terminal=terminal)
    assert [line for line in lines[1:] if "bar" not in line] == ["one", "two", "three", "c", "no end"]
    if state == "open":
        shown = os.read(ours, 100_000).decode()
        assert "one" in shown
        assert "bar:   0%" in shown
        assert "a\rb\rc" in shown


LASTS = """
import os, sys
from pathlib import Path
from sae_training.machine import log
from sae_training.machine.terminal import lasting
for name in ("one", "two"):
    with lasting():
        log.keep_in(Path(name))
        print("out", name, flush=True)
        print("err", name, file=sys.stderr, flush=True)
        os.system("echo child")
"""


def test_a_stream_that_breaks_goes_on_in_the_log_of_each_job_and_the_other_stays(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    reads, writes = os.pipe()
    os.close(reads)  # as `| head` ends
    with (tmp_path / "err.log").open("w") as err:
        subprocess.run(
            [sys.executable, "-c", LASTS], stdout=writes, stderr=err, check=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    os.close(writes)
    assert (tmp_path / "err.log").read_text() == "err one\nerr two\n"
    for name in ("one", "two"):
        first, *others = (tmp_path / name / "run.log").read_text().splitlines()
        assert "the terminal is gone (Broken pipe)" in first
        assert [line for line in others if line] == [f"out {name}", "child"]
