"""The page of all runs in a folder, runs.html: a table to filter and to check runs in, and the curves of those checked.

The page holds its data. While it is watched, the newest data lie beside it as a script, which an open page loads every
few seconds: a browser lets a page of the file system run scripts, but not read files. Nothing is loaded anew but the
data, so that the reader keeps the place, the zoom and the focus.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from sae_training.machine.files import write_text
from sae_training.machine.paths import command
from sae_training.machine.run_files import RUNS_DATA_FILE, RUNS_PAGE_FILE
from sae_training.report.all_runs import RunsRead
from sae_training.report.page import PLOT_BUTTONS, render

WATCH_EVERY_S = 5.0


def write_runs_page(folder: str | Path) -> Path:
    """Write `folder/runs.html`, the page of all runs below a folder, and return its path.

    Raises FileNotFoundError if there is no run in it.
    """
    folder = Path(folder)
    runs = RunsRead(folder)
    data = data_of(runs)
    if not data["runs"]:
        found = "holds no run" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {found}, expected a run folder or a folder of runs (runs/)")
    return write_page(runs, data)


def watch_runs(folder: str | Path, tell: Callable[[str], None]) -> Path:
    """Keep the page of all runs below a folder fresh until Ctrl-C, and return its path; the folder may hold none yet.

    `tell` hears where the page is, and what kept it from being written, which is tried again.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected a folder of runs (runs/)")
    runs = RunsRead(folder)
    page = write_page(runs, data_of(runs, WATCH_EVERY_S))
    tell(f"{page}\nKept fresh every {WATCH_EVERY_S:g} s, also where it is open; Ctrl-C ends it.")
    told = ""
    try:
        while True:
            try:
                write_text(folder / RUNS_DATA_FILE, in_script(data_of(runs, WATCH_EVERY_S)))
                told = ""
            except OSError as error:  # a disk that is full may have room again
                if str(error) != told:
                    tell(told := str(error))
            time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        data = data_of(runs)
        write_text(folder / RUNS_DATA_FILE, in_script(data))
        return write_page(runs, data)


def data_of(runs: RunsRead, every_s: float | None = None) -> dict[str, Any]:
    """Return what the page shows now; `every_s`: how often new data come, None if none do."""
    data = runs.look()
    stamp = zlib.crc32(json.dumps(data).encode())
    how = command("report", runs.folder, "--watch")
    return data | {"stamp": stamp, "written": int(time.time()), "every_s": every_s, "how": how}


def write_page(runs: RunsRead, data: dict[str, Any]) -> Path:
    path = runs.folder / RUNS_PAGE_FILE
    name = f"Runs in {runs.folder.resolve().name}"
    parts = {"data": htmlsafe_json_dumps(data), "data_file": RUNS_DATA_FILE, "buttons": PLOT_BUTTONS}
    write_text(path, render("runs.html.j2", name, [], draws=True, **parts))
    return path


def in_script(data: dict[str, Any]) -> str:
    """Return the data as the script that an open page loads."""
    return f"showRuns({htmlsafe_json_dumps(data)});\n"
