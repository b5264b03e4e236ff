"""The first thing that a detached process runs: it takes on the environment of who started it, and becomes the job.

A tmux server gives its own environment to what it starts, which may be days old. This file is run by its path, and
imports nothing of the package, because where that lies is part of the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

START_FILE = "start.json"  # in the ticket: command, environment, folder; gone once it is read, as it may hold keys
PID_FILE = "pid"
OF_TERMINAL = ("TMUX", "TMUX_PANE", "TERM")


def begin(ticket: Path) -> None:
    start = json.loads((ticket / START_FILE).read_text(encoding="utf-8"))
    (ticket / START_FILE).unlink()
    environment = start["environment"] | {name: os.environ[name] for name in OF_TERMINAL if name in os.environ}
    os.chdir(start["folder"])
    partial = ticket / f"{PID_FILE}.tmp"
    partial.write_text(str(os.getpid()), encoding="ascii")
    os.replace(partial, ticket / PID_FILE)
    os.execve(start["command"][0], start["command"], environment)


if __name__ == "__main__":
    begin(Path(sys.argv[1]))
