from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sae_training
from sae_training.machine.interrupt import StopRequest

# A step of training, in which Python runs no signal handlers; then saving, which takes a minute.
LOOP = """
import os, sys, time
from sae_training.machine.interrupt import StopRequest

def say(text):  # in one piece: StopRequest speaks in a thread of its own
    os.write(1, (text + "\\n").encode())

if "interactive" in sys.argv:
    sys.ps1 = "> "
with StopRequest(say) as stop:
    say("training")
    while stop.signal is None:
        pow(7, 10**6)
    say("noted " + stop.signal.name)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that trains, and saves for a minute when asked to stop."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sae_training.__file__).parent.parent)}
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert line(process) == "training"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted_and_the_second_stops_at_once(
    start: Start, first: signal.Signals, second: signal.Signals
) -> None:
    process = start()
    process.send_signal(first)
    said = sorted([line(process), line(process)])
    assert said[0].startswith(f"{first.name}: finishing this step, then saving.")
    assert said[1] == f"noted {first.name}"
    process.send_signal(second)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + second
    assert errors == ""


def test_two_signals_within_one_step_stop_at_once(start: Start) -> None:
    process = start()
    process.send_signal(signal.SIGINT)
    line(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT


def test_second_signal_in_an_interactive_session_raises_and_keeps_the_process(start: Start) -> None:
    process = start("interactive")
    process.send_signal(signal.SIGINT)
    line(process)
    line(process)
    time.sleep(0.1)  # into the loop of plain Python
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert "KeyboardInterrupt" in errors


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def wait_for(stop: StopRequest) -> None:
    deadline = time.monotonic() + 5
    while stop.signal is None and time.monotonic() < deadline:
        time.sleep(0.001)


def test_handlers_are_restored_after_a_quiet_run() -> None:
    before = handlers()
    with StopRequest(print):
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before


def test_handlers_are_restored_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopRequest(print):
        raise ZeroDivisionError
    assert handlers() == before


def test_handlers_are_restored_after_a_signal() -> None:
    before, said = handlers(), []
    with StopRequest(said.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(stop)
    assert stop.signal is signal.SIGTERM
    assert len(said) == 1
    assert handlers() == before


def test_own_handler_of_the_caller_works_again_afterwards() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with StopRequest(lambda message: None) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(stop)
        assert got == []
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def test_wakeup_file_of_the_caller_is_restored() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end)
    try:
        with StopRequest(print):
            pass
        assert signal.set_wakeup_fd(before) == write_end
    finally:
        signal.set_wakeup_fd(before)
        os.close(read_end)
        os.close(write_end)


def test_no_thread_and_no_open_file_is_left() -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with StopRequest(print):
            pass
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_request_can_be_entered_again() -> None:
    stop = StopRequest(print)
    before = handlers()
    for _ in range(2):
        with stop:
            pass
    assert handlers() == before


def test_nothing_is_installed_outside_the_main_thread() -> None:
    before, inside = handlers(), []

    def train() -> None:
        with StopRequest(print) as stop:
            inside.append((handlers(), stop.signal))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert inside == [(before, None)]
    assert handlers() == before
