"""Ctrl-C in scripts and notebooks: one message, which says what is saved and how to go on, and no traceback."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from sae_training.machine.interrupt import TrainingInterrupted, without_traceback
from sae_training.machine.paths import command

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}

SCRIPT = """
import sys, time
from sae_training.machine.interrupt import without_traceback
with without_traceback(*sys.argv[1:]):
    print("begun", flush=True)
    time.sleep(60)
"""


def heed_ctrl_c() -> None:
    """Undo what a shell does to its background jobs, in a process that is about to start a program."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(process: subprocess.Popen[str], begun: str) -> tuple[int, str]:
    """Send Ctrl-C once the process has written `begun`; its exit code, and what it said on stderr."""
    assert process.stdout is not None
    for line in process.stdout:
        if begun in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    yield process
    process.kill()
    process.communicate()


def test_demo_that_is_interrupted_in_training_says_how_to_go_on(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    deadline = time.monotonic() + 600
    status = tmp_path / "runs" / "demo" / "status.json"
    while not status.exists():
        assert demo.poll() is None, demo.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    demo.send_signal(signal.SIGINT)
    _, err = demo.communicate(timeout=120)
    assert demo.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert "Stopped by SIGINT after step" in err
    assert "python -m sae_training resume runs/demo" in err


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([], "Stopped. The same command begins anew, or goes on from what is saved."),
        (["It is in runs/a."], "Stopped. It is in runs/a."),
    ],
)
def test_script_that_has_saved_nothing_says_so_in_a_line(saved: list[str], expected: str) -> None:
    words = [sys.executable, "-c", SCRIPT, *saved]
    process = subprocess.Popen(
        words,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    assert interrupt(process, "begun") == (130, f"\n{expected}\n")


@pytest.mark.parametrize(
    "script",
    [path for path in sorted((ROOT / "scripts").rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.name,
)
def test_every_script_ends_without_a_traceback(script: Path) -> None:
    main = script.read_text(encoding="utf-8").partition('if __name__ == "__main__":')[2]
    in_main = script.read_text(encoding="utf-8").partition("def main(")[2].partition("\ndef ")[0]
    assert any(word in main + in_main for word in ("with without_traceback(", "with suppress(KeyboardInterrupt)"))


def test_what_the_run_says_is_shown_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, without_traceback("not this"):
        raise TrainingInterrupted("Stopped by SIGTERM, saved.", 143)
    assert left.value.code == 143
    assert capsys.readouterr().err == "\nStopped by SIGTERM, saved.\n"


def test_notebook_shows_the_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shell = InteractiveShell()
    shell.run_cell(
        "from sae_training.machine.interrupt import TrainingInterrupted\n"
        "def train(): raise TrainingInterrupted('Stopped by SIGINT, saved.', 130)\n"
        "train()"
    )
    shown = capsys.readouterr()
    assert (shown.out + shown.err).strip() == "Stopped by SIGINT, saved."


@pytest.mark.parametrize("name", ["plain", "two words", "a#b", "a & b", "it's", "$HOME", "ä\tö"])
def test_a_command_that_is_shown_can_be_pasted_into_a_shell(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir()
    shown = command("resume", path)
    assert shlex.split(shown) == ["python", "-m", "sae_training", "resume", str(path)]
    asked = f'python() {{ for word in "$@"; do last=$word; done; cd "$last" && pwd; }}; {shown}'
    done = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}\n"
