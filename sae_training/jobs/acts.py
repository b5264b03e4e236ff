"""What people do with jobs: look at one, stop it, remove it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from sae_training.jobs.found import DEEPEST, Job, folders_below, is_job, job_at, place_of, tickets_in
from sae_training.jobs.said import Said
from sae_training.machine.errors import cannot_write
from sae_training.machine.lock import LETS_GO_WITHIN, exclusive
from sae_training.machine.phases import say
from sae_training.machine.run_files import LOCK_FILE, LOG_FILE

LOOKS_EVERY = 0.2  # seconds
SAYS_AFTER = 5.0
LIVES_ON_AFTER = 30.0  # from the end of its job: a process that does other things, as that of a notebook


def now(job: Job) -> Job:
    """Return the job as it is now; one that had only a ticket may have a folder since."""
    return job_at(place_of(job.folder), job.name)


def show_log(job: Job, follow: bool) -> None:
    """Write what a job has said; with `follow` also what it says until it ends."""
    if not (job.folder / LOG_FILE).is_file():
        raise FileNotFoundError(
            f"{job.name}: has no {LOG_FILE}, because it was started without --detach; what it says is in its terminal."
        )
    said = Said(job.folder, sys.stdout)
    while True:
        is_live = now(job).is_live  # asked first, so that nothing it has left is missed
        said.show()
        if not (follow and is_live):
            return
        time.sleep(LOOKS_EVERY)


def attach(job: Job) -> None:
    """Show the terminal of a job in tmux in this one, until it is left or the job ends."""
    if not job.is_live or job.holder is None:
        raise ValueError(f"{job.name}: is not running, but {job.state}; `sae-training logs` shows what it said.")
    check_here(job, "look at it")
    if job.holder.tmux is None:
        raise ValueError(f"{job.name}: runs without tmux; this follows it: sae-training logs -f {called(job)}")
    if not sys.stdin.isatty():
        raise ValueError(f"{job.name}: attach needs a terminal; this does not: sae-training logs -f {called(job)}")
    server, pane = job.holder.tmux
    is_inside = os.environ.get("TMUX", "").split(",")[0] == server
    command = ["tmux", "-S", server, "switch-client" if is_inside else "attach-session", "-t", pane]
    environment = {name: value for name, value in os.environ.items() if is_inside or name != "TMUX"}
    if code := subprocess.call(command, env=environment):
        follows = f"sae-training logs -f {called(job)}"
        raise OSError(f"{job.name}: {shlex.join(command)} ended with exit code {code}; this follows the run: {follows}")


def stop(job: Job, at_once: bool) -> str:
    """Stop a job, and wait for its end; return what became of it and what that costs.

    With `at_once` it saves nothing.
    """
    if not job.is_live or job.holder is None:
        return f"{job.name}: is not running, but {job.state}; nothing was done.\n"
    check_here(job, "stop it")
    pid = job.holder.pid
    try:
        os.kill(pid, signal.SIGKILL if at_once else signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)  # in case it is stopped, and would not hear
    except PermissionError as error:
        raise PermissionError(f"{job.name}: process {pid} is another user's, who alone may stop it.") from error
    except ProcessLookupError:
        pass  # it has ended
    asked, is_told, ended_at = time.monotonic(), False, None
    while job.holder.life() != "dead":
        waited = time.monotonic() - asked
        if not now(job).is_live:
            ended_at = ended_at or waited
            if waited > ended_at + LIVES_ON_AFTER:
                break
        elif not is_told and waited > SAYS_AFTER:
            is_told = True
            does = "finishing its step, then saving" if job.goes_on else "coming to its end"
            say(f"{job.name}: {does}. Ctrl-C leaves it to that; stop --now stops it at once.")
        time.sleep(LOOKS_EVERY)
    ended = now(job)
    step = ended.status.get("step")
    after = "" if step is None else f" after step {step:,}"
    if not ended.goes_on and ended.state != "finished":
        return f"{job.name}: stopped; {ended.kind} saves nothing until it is finished: the same command begins anew.\n"
    if ended.state == "lost":
        return f"{job.name}: stopped at once; what it has saved is there, and the same command goes on from it.\n"
    return f"{job.name}: {ended.state}{after}.\n"


def check_here(job: Job, what: str) -> None:
    """Raise ValueError unless the job's process is one of those that this one sees."""
    holder = job.holder
    if holder is None or holder.is_here:
        return
    where = f"on {holder.host}"
    if holder.host == socket.gethostname():
        where = f"in another container of {holder.host}, or did before that was started anew"
    raise ValueError(f"{job.name}: runs {where}, as process {holder.pid}; {what} there. Its folder is {job.folder}.")


def remove(job: Job, run_dir: Path) -> None:
    """Delete a job's folder, which is first renamed, so that nothing ever goes on with half of it.

    Raise an error if it is at work, or if one is below it.
    """
    folder = job.folder
    if folder.is_symlink():
        raise ValueError(f"{folder}: is a link to {folder.resolve()}; give that folder.")
    for live in (job, *(job_at(path, path.name) for path in folders_below(folder, DEEPEST))):
        if live.is_live:
            raise ValueError(f"{live.folder}: is at work; stop it first: sae-training stop {shlex.quote(str(folder))}")
    is_run = job.kind in ("train", "toy")
    lock = exclusive(
        folder / LOCK_FILE if is_run else folder.with_name(f".{folder.name}.lock"),
        lambda: f"{folder}: a process is at work there; wait for it.",
        LETS_GO_WITHIN,
    )
    try:
        gone = folder.with_name(f".{folder.name}.removed-{os.getpid()}")
        os.rename(folder, gone)
    except PermissionError as error:
        raise cannot_write(folder.parent, error) from error
    finally:
        lock.release()
    shutil.rmtree(gone)
    for ticket in tickets_in(run_dir):
        if not is_job(place_of(ticket)):
            shutil.rmtree(ticket, ignore_errors=True)


def called(job: Job) -> str:
    return shlex.quote(str(job.folder))
