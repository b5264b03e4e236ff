"""The files in a run's folder: their names, for all that write or read one, and what one of JSON holds.

    runs/<run name>/   config.json, environment.json, status.json, metrics.jsonl, report.html, run.log
                       checkpoints/step_<n>/, snapshots/step_<n>/, final/

A run of several autoencoders has a folder for each, with its own config.json, metrics.jsonl, snapshots/ and final/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_CONFIG_FILE = "config.json"  # the run's config and the versions of packages; cfg.json is that of an autoencoder
ENVIRONMENT_FILE = "environment.json"  # threads and processor that the run began with
STATUS_FILE = "status.json"  # of caches and builds too, as are .holder.json and run.log
HOLDER_FILE = ".holder.json"  # which process works in the folder
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
LOG_FILE = "run.log"  # what a detached job said, or one whose terminal is gone
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
FINAL = "final"  # its presence says that the run is finished
EVALUATION_FILE = "evaluation.json"  # in final/

# In a folder of runs.
RUNS_PAGE_FILE = "runs.html"
RUNS_DATA_FILE = "runs-data.js"  # the newest data of the page, while it is kept fresh


def read_if_sound(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged, for readers that do without."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
