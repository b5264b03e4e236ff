"""The verbs over jobs: `runs`, `attach`, `logs`, `stop`, `rm`, `completion`, and how `--detach` starts one.

None of them needs torch, so they answer at once.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

from tyro.conf import Positional, arg

from sae_training.flags import Common, InRunDir
from sae_training.jobs import acts
from sae_training.jobs.completion import script
from sae_training.jobs.found import find_job, jobs_in
from sae_training.jobs.table import table

REDRAWN_EVERY = 2.0  # seconds, on a terminal
PRINTED_EVERY = 10.0  # seconds, elsewhere
CLEARED = "\x1b[H\x1b[2J"

Run = Annotated[str, Positional, arg(metavar="RUN")]


@dataclass(kw_only=True)
class Runs(InRunDir):
    """List runs, caches, builds and toy runs: state, step, tokens/s, ETA and figures.

    training: at work, whatever its kind; finished; interrupted: stopped, after saving; failed: by an error; lost: ended
    without a word, by a kill or a power cut, or on another host without a sign of life for two minutes.
    """

    watch: bool = False
    """Print it again and again, until Ctrl-C."""

    json: bool = False
    """Print one JSON list; with --watch a line each time."""


@dataclass(kw_only=True)
class Attach(InRunDir):
    """Show the terminal of a run that --detach started in tmux; Ctrl-B D leaves it."""

    run: Run
    """Name of a run, or its folder."""


@dataclass(kw_only=True)
class Logs(InRunDir):
    """Print what a run has said that --detach started: run.log in its folder."""

    run: Run
    """Name of a run, or its folder."""

    follow: bool = False
    """Go on with what it says, until it ends; the same as -f."""


@dataclass(kw_only=True)
class Stop(InRunDir):
    """Let a run save and stop, and wait for it."""

    run: Run
    """Name of a run, or its folder."""

    now: bool = False
    """Stop it at once (SIGKILL): it goes on from its last checkpoint."""


@dataclass(kw_only=True)
class Rm(InRunDir):
    """Delete the folder of a run that is not at work, after asking."""

    run: Run
    """Name of a run, or its folder."""

    yes: bool = False
    """Do not ask."""


@dataclass(kw_only=True)
class Completion(Common):
    """Print what lets a shell complete verbs, flags and names of runs: `eval "$(sae-training completion bash)"`."""

    shell: Annotated[Literal["bash", "zsh"], Positional, arg(metavar="SHELL")]
    """bash or zsh."""


JobVerb = Runs | Attach | Logs | Stop | Rm | Completion


def carry_out_job_verb(verb: JobVerb, of_tyro: Callable[[str], str]) -> None:
    """Carry out the verb. `of_tyro` returns what tyro prints for a shell that completes flags."""
    match verb:
        case Runs():
            list_runs(verb)
        case Attach():
            acts.attach(find_job(verb.run, verb.run_dir))
        case Logs():
            acts.show_log(find_job(verb.run, verb.run_dir), verb.follow)
        case Stop():
            sys.stdout.write(acts.stop(find_job(verb.run, verb.run_dir), verb.now))
        case Rm():
            remove(verb)
        case Completion():
            sys.stdout.write(script(verb.shell, of_tyro(verb.shell)))
        case _:
            assert_never(verb)


def in_long(words: Sequence[str]) -> list[str]:
    """Return the words after `logs` with the long name of the flag that has a short one."""
    return ["--follow" if word == "-f" else word for word in words]


def list_runs(verb: Runs) -> None:
    is_screen = sys.stdout.isatty() and not verb.json
    try:
        while True:
            jobs = jobs_in(verb.run_dir)
            if verb.json:
                text = json.dumps([job.in_json() for job in jobs], indent=None if verb.watch else 1) + "\n"
            elif jobs:
                columns, lines = shutil.get_terminal_size()
                shown = jobs[: max(1, lines - 2)] if is_screen and verb.watch else jobs
                text = table(shown, columns if is_screen else None)
            else:
                text = f"There are no runs in {verb.run_dir}.\n"
            sys.stdout.write(CLEARED * (is_screen and verb.watch) + text)
            sys.stdout.flush()
            if not verb.watch:
                return
            time.sleep(REDRAWN_EVERY if is_screen else PRINTED_EVERY)
    except KeyboardInterrupt:
        if not verb.watch:
            raise


def remove(verb: Rm) -> None:
    job = find_job(verb.run, verb.run_dir, takes_members=False)
    if not verb.yes:
        if not sys.stdin.isatty():
            raise ValueError(f"{job.folder}: rm asks, and there is no terminal; --yes says that it is meant.")
        sys.stderr.write(f"Delete {job.folder} ({job.kind}, {job.state})? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            sys.stdout.write(f"{job.folder} is left as it is.\n")
            return
    acts.remove(job, verb.run_dir)
    sys.stdout.write(f"{job.folder} is deleted.\n")
