"""Which devices this machine has."""

from __future__ import annotations

import torch


def is_there(device: str | torch.device) -> bool:
    """Whether torch can compute on the device here."""
    wanted = torch.device(device)
    return wanted.type == "cpu" or (wanted.index or 0) < count(wanted.type)


def count(kind: str) -> int:
    """How many devices of a kind there are."""
    match kind:
        case "cuda":
            return torch.cuda.device_count() if torch.cuda.is_available() else 0
        case "xpu":
            return torch.xpu.device_count() if torch.xpu.is_available() else 0
        case "mps":
            return int(torch.backends.mps.is_available())
        case _:
            return 1


def automatic() -> str:
    """The device that "auto" means: a CUDA GPU if there is one, else the CPU.

    It is never mps, though a Mac has it: nobody has tested this package there, TransformerLens warns of silently wrong
    results, and the sparse step, several times faster than the dense one, is for the CPU and CUDA only.
    """
    return "cuda" if count("cuda") else "cpu"


def checked(device: str | torch.device, field: str = "device") -> torch.device:
    """The device that a config's `field` names; ValueError, saying what there is, if this machine lacks it."""
    if is_there(device):
        return torch.device(device)
    kind = torch.device(device).type
    n = count(kind)
    found = f"this machine has only {kind}:0" + f" to {kind}:{n - 1}" * (n > 1)
    if n == 0:
        found = f"torch {torch.__version__} finds no {kind} device on this machine"
    others = [other for other in ("cuda", "xpu", "mps") if count(other) > 0]
    raise ValueError(f"{field}: found {str(device)!r}, but {found}; set it to {' or '.join([*others, 'cpu'])}.")
