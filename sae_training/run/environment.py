"""What a run began with beside its config, in environment.json: what its roundings depend on.

The file is written once. A run that goes on computes with as many threads as it began with, because the order of sums,
and so their last bits, depends on it.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sae_training.machine.files import write_text
from sae_training.machine.run_files import ENVIRONMENT_FILE
from sae_training.parallel.ranks import n_ranks, of_first


def write_environment(folder: Path) -> None:
    """Write environment.json into the folder of a run, unless it is there."""
    path = folder / ENVIRONMENT_FILE
    if not path.is_file():
        write_text(path, json.dumps(environment(), indent=2) + "\n", last=True)


def environment() -> dict[str, Any]:
    return {
        "processes": n_ranks(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
    }


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_environment(folder: Path) -> dict[str, Any]:
    """Return what environment.json says; nothing where an earlier version has begun the run, or the file is damaged."""
    try:
        values = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def restore_threads(folder: Path) -> None:
    """Compute with as many threads as the run in `folder` began with, if there is one, on each of its processes.

    A run that goes on in another number of processes sums in another order anyway, and keeps the threads of now.
    """
    began = of_first(lambda: read_environment(folder))
    threads, here = began.get("threads"), torch.get_num_threads()
    if began.get("processes") != n_ranks() or not isinstance(threads, int) or threads < 1 or threads == here:
        return
    torch.set_num_threads(threads)
    tqdm.write(f"Threads: {threads}, as the run began with (roundings depend on it), not {here} as here.")
