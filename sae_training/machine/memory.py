"""Memory of a device or of the machine: how much this process uses, and how much it can still get."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import psutil
import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def sharers_of(device: torch.device) -> int:
    """Return how many processes have the memory of a device: on a GPU one, else all that torchrun started here."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes that this process uses, and bytes that it can still allocate, on a CUDA device or else on the machine.

    Of what the machine can give, each of the processes that torchrun started on it gets the same share.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        in_use = torch.cuda.memory_allocated(device)
        return in_use, free + reserved - in_use
    in_use, n = psutil.Process().memory_info().rss, sharers_of(device)
    return in_use, int(min(psutil.virtual_memory().available / n, limit_of_container() / n - in_use))


def limit_of_container() -> float:
    """Bytes that the container allows; infinite outside a container."""
    for path in CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return math.inf


def gigabytes(n_bytes: Any) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB"
