"""What a benchmark's JSON says about the machine it ran on. Needs the standard library only, and torch where it is."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VECTOR_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Of a processor's flags, those that decide how fast its products are; the last three are Arm's."""


def machine_facts() -> dict[str, Any]:
    """The processor's name, vector flags and cores, the load, the system, and the commit that is measured."""
    return {
        "cpu": cpu_name(),
        "vector_flags": vector_flags(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(ROOT),
    }


def cpu_name() -> str:
    return cpu_info("model name") or platform.processor() or platform.machine()


def vector_flags() -> list[str]:
    """Those of VECTOR_FLAGS that the processor has; empty where /proc/cpuinfo is missing."""
    flags = (cpu_info("flags") or cpu_info("Features") or "").split()
    return [flag for flag in VECTOR_FLAGS if flag in flags]


def cpu_info(key: str) -> str | None:
    """The first value of `key` in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(": ")[2] for line in lines if line.partition(":")[0].strip() == key), None)


def commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
