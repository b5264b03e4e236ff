"""Runs one part of `scripts/gpu_check.py` in the process that the script started for it.

A part is a dict of items, name -> function without arguments that returns figures. An item that raises is reported as
failed, one that needs a package that is not there, or raises `Skip`, as skipped. Replies are JSON lines on stdout;
whatever else is printed goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import sysconfig
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]
Items = dict[str, Callable[[], Figures]]

MODULES = {
    "kernels": "gpu_kernels",
    "steps-768": "gpu_steps",
    "steps-4096": "gpu_steps",
    "sparsify": "gpu_steps",
    "tests": "gpu_runs",
    "live": "gpu_runs",
    "ranks": "gpu_ranks",
    "ahead": "gpu_runs",
}
CRASHED = 75  # as in gpu_check: nothing more can be computed in this process
WARM_UP, MOST_TIMED, TIMED_SECONDS = 3, 20, 2.0


class Skip(Exception):
    """An item has nothing to do on this machine; the message says why."""


def run_part(name: str, cpu: bool, first: int) -> int:
    """Run the items of a part from number `first` on, and report each; the process's exit status."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    device = torch.device("cpu" if cpu else "cuda")
    if not cpu and not torch.cuda.is_available() and name != "device":
        reply(state="skipped", reason="no CUDA device: torch.cuda.is_available() is False")
        return 0
    try:
        items = {"torch and triton": lambda: about_device(device)} if name == "device" else items_of(name, device)
    except Exception as error:
        traceback.print_exc()
        reply(**outcome(error))
        return 0
    for what, function in list(items.items())[first:]:
        reply(what=what, state="running")
        start = time.perf_counter()
        try:
            figures = function()
        except Exception as error:
            traceback.print_exc()
            reply(what=what, **outcome(error))
            if "CUDA error" in str(error):  # an illegal access spoils the whole process
                return CRASHED
        else:
            machine = {"machine": figures.pop("machine")} if "machine" in figures else {}
            reply(what=what, state="done", seconds=round(time.perf_counter() - start, 2), figures=figures, **machine)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def items_of(name: str, device: torch.device) -> Items:
    return importlib.import_module(f"scripts.benchmarks.{MODULES[name]}").items(name, device)


def outcome(error: Exception) -> dict[str, str]:
    """The state and the reason of an item that raised `error`."""
    missing = isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(("sae_", "scripts"))
    reason = str(error) if isinstance(error, Skip | ModuleNotFoundError) else f"{type(error).__name__}: {error}"
    return {"state": "skipped" if missing or isinstance(error, Skip) else "failed", "reason": reason[:2000]}


def about_device(device: torch.device) -> Figures:
    """The versions, the device, and whether Triton has the C compiler and the Python headers it builds with."""
    triton = importlib.util.find_spec("triton") is not None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    facts: Figures = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "c_compiler": compiler,
        "headers": headers,
    }
    facts["triton"] = importlib.import_module("triton").__version__ if triton else None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise Skip("no CUDA device: torch.cuda.is_available() is False")
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)}
        facts["capability"] = f"{properties.major}.{properties.minor}"
    return facts | {"machine": dict(facts)}


# ------------------------------------------------------------------------------------------------------------- timing


def median_ms(function: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of `function` after WARM_UP calls, by CUDA events; on a CPU, of one call by the clock.

    At most MOST_TIMED calls, and no more after TIMED_SECONDS.
    """
    on_cpu = device.type == "cpu"  # a dry run, whose times are of no use
    for _ in range(1 if on_cpu else WARM_UP):
        function()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 1 or (not on_cpu and len(times) < MOST_TIMED and time.perf_counter() - begin < TIMED_SECONDS):
        if not on_cpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            at = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - at))
    return statistics.median(times)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most GiB of device memory in tensors at once since `forget_peak`; None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None
