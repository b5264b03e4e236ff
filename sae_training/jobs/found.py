"""Which jobs there are, and what state each is in, told from their folders (`run.record`).

Jobs lie in a folder of runs: runs/<name>, runs/<name>/analysis. A detached job that has no folder yet, or none of its
own, or one elsewhere, has a ticket: runs/.detached/<name>. No torch is imported here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_training.machine.holder import Holder, State, read_holder, state_of
from sae_training.machine.log import PLACE_FILE
from sae_training.machine.run_files import (
    CHECKPOINTS,
    FINAL,
    HOLDER_FILE,
    LOG_FILE,
    SNAPSHOTS,
    STATUS_FILE,
    read_if_sound,
)

RUN_DIR = "runs"  # where jobs are looked for, unless another folder is named
TICKETS = ".detached"

DEEPEST = 4  # folders below a folder of runs: <name>/analysis-of/step_1/analysis

HOLD_NO_JOBS = (CHECKPOINTS, SNAPSHOTS, FINAL, "rows", "contexts", "buckets", "building")
"""Folders below that of a job. A run may have such a name, too."""

IN_JSON = ("step", "total_steps", "tokens_per_s", "eta_s", "explained_variance", "l0", "dead_latents")


@dataclass(frozen=True)
class Job:
    """A job, as its folder shows it."""

    name: str
    """What the verbs call it: its path below the folder of runs, or of a job elsewhere its ticket's name."""
    folder: Path
    kind: str
    state: State
    detail: str
    """What else is to be said of the state, or "" ."""
    since: str
    """When this state began, as 2026-01-31T12:00:00Z; "" if nothing says it."""
    status: dict[str, Any]
    """The content of status.json."""
    holder: Holder | None

    @property
    def is_live(self) -> bool:
        return self.state == "training"

    @property
    def goes_on(self) -> bool:
        """Whether the same command goes on with it after a stop; others save nothing until they are finished."""
        return self.kind in ("train", "cache", "build")

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE

    def in_json(self) -> dict[str, Any]:
        """Return what programs read of it; what is not known is null."""
        figures = {name: self.status.get(name) for name in IN_JSON}
        if not self.is_live:
            figures["eta_s"] = None
        ours = {"kind": self.kind, "name": self.name, "state": self.state, "detail": self.detail}
        process = {"pid": self.holder and self.holder.pid, "host": self.holder and self.holder.host}
        return ours | figures | {"since": self.since, "folder": str(self.folder.absolute())} | process


def is_job(folder: Path) -> bool:
    return (folder / HOLDER_FILE).is_file() or "state" in read_if_sound(folder / STATUS_FILE)


def job_at(folder: Path, name: str) -> Job:
    """Return the job whose folder it is, in the state that it is in now."""
    holder = read_holder(folder)  # before the status, which a job that ends writes first
    status = read_if_sound(folder / STATUS_FILE)
    state, life = state_of(folder, status, holder)
    since, detail = str(status.get("updated", "")), "stopped, and waits for SIGCONT" if life == "stopped" else ""
    if holder is not None and state == "training":
        since = holder.since
    elif holder is not None and state == "lost":
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(holder.beat))
    return Job(name, folder, str(status.get("kind", "train")), state, detail, since, status, holder)


# ---------------------------------------------------------------------------------------------------------- all of them


def jobs_in(run_dir: Path) -> list[Job]:
    """Return all jobs of a folder of runs: those that live first, then the newest."""
    jobs = [job_at(folder, name) for name, folder in places_in(run_dir)]
    by_time = sorted(jobs, key=lambda job: job.since, reverse=True)
    return sorted(by_time, key=lambda job: not job.is_live)


def places_in(run_dir: Path) -> Iterator[tuple[str, Path]]:
    """Iterate over the names and folders of the jobs of a folder of runs."""
    seen = set()
    for folder in folders_below(run_dir, DEEPEST):
        seen.add(folder.resolve())
        yield folder.relative_to(run_dir).as_posix(), folder
    for ticket in tickets_in(run_dir):
        folder = place_of(ticket)
        if folder.resolve() not in seen and is_job(folder):
            seen.add(folder.resolve())
            yield ticket.name, folder


def folders_below(folder: Path, depth: int, is_in_job: bool = False) -> Iterator[Path]:
    is_in_job = is_in_job or is_job(folder)
    try:
        found = sorted((entry for entry in os.scandir(folder) if entry.is_dir()), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        path = folder / entry.name
        if entry.name.startswith(".") or (is_in_job and entry.name in HOLD_NO_JOBS):
            continue
        if is_job(path):
            yield path
        if depth > 1:
            yield from folders_below(path, depth - 1, is_in_job)


def tickets_in(run_dir: Path) -> list[Path]:
    try:
        return sorted(path for path in (run_dir / TICKETS).iterdir() if path.is_dir())
    except OSError:
        return []


def place_of(ticket: Path) -> Path:
    """Return the folder of a ticket's job; the ticket itself, if the job has none yet or none of its own."""
    folder = read_if_sound(ticket / PLACE_FILE).get("folder")
    return Path(folder) if isinstance(folder, str) else ticket


# ------------------------------------------------------------------------------------------------------ one by its name


def find_job(run: str, run_dir: Path, takes_members: bool = True) -> Job:
    """Return the job that a word names: a name below `run_dir`, or a path.

    With `takes_members` the folder of one of several autoencoders names the run of all of them.
    """
    named = [run_dir / run, Path(run)]
    members = [folder.resolve().parent for folder in named if takes_members and folder.is_dir()]
    for folder in (*named, place_of(run_dir / TICKETS / run), *members):
        if is_job(folder):
            return job_at(folder, name_of(folder, run_dir))
    raise FileNotFoundError(
        f"RUN: found {run!r}, expected the name of a run in {run_dir}, or the folder of one; `sae-training runs` lists "
        "them, and --run_dir names another folder."
    )


def folder_named(run: Path, run_dir: Path) -> Path:
    """Return the folder of the run that a word names; a folder as it is, of which who reads it says what is wrong."""
    try:
        return find_job(str(run), run_dir, takes_members=False).folder
    except FileNotFoundError:
        if run.exists():
            return run
        raise


def name_of(folder: Path, run_dir: Path) -> str:
    for name, place in places_in(run_dir):
        if place.resolve() == folder.resolve():
            return name
    return str(folder)
