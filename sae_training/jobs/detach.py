"""Start a job that needs no terminal: in a tmux session of its name, or without tmux in a session of the system's.

Before the job has a folder it has a ticket, runs/.detached/<name>, with its log. The command that starts it reads along
until the job is at work, or has ended with an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sae_training
from sae_training.jobs import begin
from sae_training.jobs.found import (
    DEEPEST,
    RUN_DIR,
    TICKETS,
    folders_below,
    is_job,
    job_at,
    name_of,
    place_of,
)
from sae_training.jobs.said import Said
from sae_training.machine.holder import ENDS, Holder, holder_of, read_holder, this_process, write_holder
from sae_training.machine.lock import exclusive
from sae_training.machine.log import TICKET
from sae_training.machine.run_files import LOCK_FILE, STATUS_FILE, read_if_sound

PATIENCE = 60.0  # seconds for a process to begin
WIDTH, HEIGHT = 160, 50  # of a session that nobody looks at

OF_THIS_TERMINAL = ("TMUX", "TMUX_PANE", "COLUMNS", "LINES")
"""Variables that are not handed on."""


@dataclass(frozen=True)
class Wanted:
    """A job that is to be started."""

    kind: str
    name: str
    run_dir: Path
    """The folder of runs that lists it."""
    folder: Path | None
    """Where it will work, if no other job may be at work there."""


def detach(wanted: Wanted, package: str, words: Sequence[str]) -> str:
    """Start `python -m package words`, wait until it is at work, and return what to do with it, in words.

    What it says meanwhile is shown. Raise OSError if it ends before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--detach: found a process of torchrun's, expected one alone; start torchrun itself in tmux.")
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ticket = claimed(wanted, begun)
    try:
        write_start(ticket, package, words)
        how, pid = started(ticket, wanted.name)
        holder = holder_of(pid, begun)
        write_holder(ticket, holder)
        watch(ticket, holder, wanted)
        said = in_words(place_of(ticket), wanted, how)
    except KeyboardInterrupt:
        run = called(ticket, wanted)
        raise KeyboardInterrupt(f"It goes on starting by itself; this stops it: sae-training stop {run}") from None
    except BaseException:
        forget(ticket, wanted.run_dir, is_over=True)
        raise
    forget(ticket, wanted.run_dir)
    return said


def claimed(wanted: Wanted, begun: str) -> Path:
    """Return the ticket of the job, which no other start of it has."""
    if wanted.name in ("", ".", "..", LOCK_FILE) or "/" in wanted.name:  # a ticket that is left behind is deleted
        raise ValueError(
            f"--detach: found the name {wanted.name!r}, expected one that a folder can have; give another."
        )
    tickets = wanted.run_dir / TICKETS
    try:
        tickets.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"run_dir: cannot write to {wanted.run_dir} ({error.strerror}); give another.") from error
    lock = exclusive(tickets / LOCK_FILE, lambda: f"{tickets}: other jobs are being started; try again.", PATIENCE)
    try:
        ticket = free_ticket(tickets, wanted)
        for folder in (wanted.folder, place_of(ticket), ticket):
            if folder is not None and is_job(folder) and (job := job_at(folder, wanted.name)).is_live:
                who = "a process" if job.holder is None else f"process {job.holder.pid} on {job.holder.host}"
                raise OSError(f"{wanted.name}: {who} is at work on it since {job.since}; wait for it, or stop it.")
        shutil.rmtree(ticket, ignore_errors=True)
        ticket.mkdir()
        write_holder(ticket, this_process(begun))  # until the job has a process of its own
        (ticket / STATUS_FILE).write_text(json.dumps({"kind": wanted.kind, "state": "training"}), encoding="utf-8")
        return ticket
    finally:
        lock.release()


def free_ticket(tickets: Path, wanted: Wanted) -> Path:
    """Return the ticket of the job's name, or of <name>-2, <name>-3, ... while that is of a job elsewhere."""
    ticket, number = tickets / wanted.name, 1
    own = wanted.folder and wanted.folder.resolve()
    while (place := place_of(ticket)) != ticket and is_job(place) and place.resolve() != own:
        number += 1
        ticket = tickets / f"{wanted.name}-{number}"
    return ticket


def write_start(ticket: Path, package: str, words: Sequence[str]) -> None:
    """Write what the process begins with: this one's environment and folder, and the words that it was given."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_THIS_TERMINAL}
    environment |= {TICKET: str(ticket.absolute()), "TQDM_DYNAMIC_NCOLS": environment.get("TQDM_DYNAMIC_NCOLS", "1")}
    root = Path(sae_training.__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # as `python -m` finds it in the current folder
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(root)]))
    command = [sys.executable, "-P", "-m", package, *words]
    start = {"command": command, "environment": environment, "folder": os.getcwd()}
    descriptor = os.open(ticket / begin.START_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(start, file)


# ---------------------------------------------------------------------------------------------------- two ways to start


def started(ticket: Path, name: str) -> tuple[str, int]:
    """Start the process. Return where it runs, in words, and its number."""
    command = [sys.executable, "-I", begin.__file__, str(ticket.absolute())]
    session, why_not = in_tmux(name, command)
    process = None if session else by_setsid(command)
    ends = time.monotonic() + PATIENCE
    while not (ticket / begin.PID_FILE).exists():
        if time.monotonic() > ends or (process is not None and process.poll() is not None):
            raise OSError(f"{name}: the process did not begin; `sae-training {name}` without --detach says why.")
        time.sleep(0.05)
    where = f"in the tmux session {session}" if session else f"in a session of its own, without tmux ({why_not})"
    return where, int((ticket / begin.PID_FILE).read_text(encoding="ascii"))


def in_tmux(name: str, command: Sequence[str]) -> tuple[str | None, str]:
    """Start the command in a new tmux session, and return its name; or None, and why there is none.

    The session is called as the job, with _ for what tmux forbids (. and :) and for #, after which tmux would run a
    command, and with -2, -3, ... if it has that name already. It ends with the command.
    """
    if shutil.which("tmux") is None:
        return None, "there is no tmux on this machine"
    from libtmux import Server
    from libtmux.exc import LibTmuxException, TmuxSessionExists

    base = session = re.sub(r"[.:#]", "_", name)
    number = 1
    while True:
        try:
            line = f"exec {shlex.join(command)}"
            Server().new_session(session, attach=False, window_command=line, x=WIDTH, y=HEIGHT)
            return session, ""
        except TmuxSessionExists:
            number += 1
            session = f"{base}-{number}"
        except LibTmuxException as error:
            return None, f"tmux: {' '.join(str(error).split())}"


def by_setsid(command: Sequence[str]) -> subprocess.Popen[bytes]:
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing)


# -------------------------------------------------------------------------------------------------- until it is at work


def watch(ticket: Path, holder: Holder, wanted: Wanted) -> None:
    """Show what the job says until it is at work or has finished. Raise OSError if it ends before."""
    said = Said(ticket, sys.stderr)
    while True:
        has_ended = holder.life() == "dead"  # asked first, so that nothing it has left is missed
        said.show()
        folder = place_of(ticket)
        status, held = read_if_sound(folder / STATUS_FILE), read_holder(folder)
        # A status that was there before may name a process of the same number.
        is_new = str(status.get("started")) >= holder.since or (
            held is not None and held.since == status.get("started")
        )
        is_own = is_new and status.get("pid") == holder.pid
        if is_own and status["state"] in ("training", "finished"):
            return
        if has_ended or (is_own and status["state"] in ENDS):
            raise OSError(f"{wanted.name}: did not start; what it said is above.")
        time.sleep(0.1)


def in_words(folder: Path, wanted: Wanted, how: str) -> str:
    """Say in what state the job in `folder` is, where it runs, and how to look at it."""
    job, run = job_at(folder, wanted.name), called(folder, wanted)
    if not job.is_live or job.holder is None:
        return f"{folder}: {job.state}\n"
    ways = {f"logs -f {run}": "what it says", f"stop {run}": "saves, and stops it" if job.goes_on else "stops it"}
    if job.holder.tmux:
        ways |= {f"attach {run}": "its terminal, which Ctrl-B D leaves"}
    width = max(map(len, ways))
    lines = [f"  sae-training {words:<{width}}  {what}\n" for words, what in ways.items()]
    return f"{folder}: {job.state}, {how}, process {job.holder.pid}.\n{''.join(lines)}"


def called(folder: Path, wanted: Wanted) -> str:
    """Return what the verbs call the job in `folder`, without flags, quoted for a shell."""
    is_default = wanted.run_dir.resolve() == Path(RUN_DIR).resolve()
    return shlex.quote(name_of(folder, wanted.run_dir) if is_default else str(folder))


def forget(ticket: Path, run_dir: Path, is_over: bool = False) -> None:
    """Remove the ticket of a job that is found without it, or that ended before it came to have a folder."""
    folder = place_of(ticket)
    if folder == ticket:
        is_needed = not is_over
    else:
        below = (path.resolve() for path in folders_below(run_dir, DEEPEST))
        is_needed = is_job(folder) and folder.resolve() not in below
    if not is_needed:
        shutil.rmtree(ticket, ignore_errors=True)
