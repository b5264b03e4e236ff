"""Safetensors files: their headers, which say what they hold, and their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_training.machine.files import read_safetensors


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """By name: float32, bfloat16, ..."""
    metadata: dict[str, str]


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def header(path: Path) -> Header:
    """Read no tensor. ValueError for a damaged or truncated file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: DTYPES.get(str(part.get_dtype()), str(part.get_dtype())) for name, part in slices.items()}
            return Header(shapes, dtypes, file.metadata() or {})
    except SafetensorError as error:
        raise damaged(path, error) from error


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU."""
    return read_safetensors(path)


def damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path}: damaged or truncated ({error}); use another copy.")
