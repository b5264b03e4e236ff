"""Safetensors files: their headers, which say what they hold, and their tensors, read in slices of a few megabytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_training.formats.json_files import parse_object
from sae_training.machine.precision import at_least_float32

SLICE_BYTES = 16 * 2**20  # in memory at once beside the result
MOST_TENSORS, MOST_AXES = 10_000, 8
MOST_HEADER_BYTES = 16 * 2**20  # the largest seen has 100 KB

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

LATENTS_LAST = ("W_enc", "w_enc", "W_E", "decoder.weight")
"""Names of matrices (d_in, d_sae) or (d_out, d_sae) that our memory holds latent by latent."""


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """By name: float32, bfloat16, ..."""
    metadata: dict[str, str]
    starts: dict[str, int] = field(default_factory=dict)
    """Where in the file each tensor begins, in bytes."""


def header(path: Path) -> Header:
    """Read no tensor. ValueError for a damaged or truncated file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < n_bytes <= min(MOST_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path}: damaged or truncated, or no safetensors file (found a header of {n_bytes:,} bytes in a file "
                f"of {size:,}, expected at most {MOST_HEADER_BYTES:,}); use another copy."
            )
        try:
            with safe_open(path, framework="pt"):  # checks sizes and offsets against the length of the file
                pass
        except SafetensorError as error:
            raise damaged(path, error) from error
        parts = parse_object(file.read(n_bytes), f"{path}, header")
    metadata = parts.pop("__metadata__", None) or {}
    most_axes = max((len(part["shape"]) for part in parts.values()), default=0)
    if len(parts) > MOST_TENSORS or most_axes > MOST_AXES:
        raise ValueError(
            f"{path}: found {len(parts):,} tensors with up to {most_axes:,} axes, expected at most {MOST_TENSORS:,} "
            f"with {MOST_AXES}, as weights have; check the file."
        )
    return Header(
        {name: tuple(part["shape"]) for name, part in parts.items()},
        {name: dtype_name(part["dtype"]) for name, part in parts.items()},
        metadata,
        {name: 8 + n_bytes + part["data_offsets"][0] for name, part in parts.items()},
    )


def dtype_name(name: str) -> str:
    return str(DTYPES[name]).removeprefix("torch.") if name in DTYPES else name


def slices(
    path: Path, head: Header, name: str, as_shape: tuple[int, ...] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A tensor's rows in order, a few megabytes at a time, each with the index of its first; a scalar is one row.

    They are read, not mapped, so that no part of the file stays in the process. `as_shape` cuts it in other rows.
    """
    shape = as_shape or head.shapes[name] or (1,)
    dtype = getattr(torch, head.dtypes[name], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path}: {name} is of type {head.dtypes[name]}, expected float32 or another that torch has.")
    width = dtype.itemsize
    for axis in shape[1:]:
        width *= axis
    rows = max(1, SLICE_BYTES // max(1, width))
    with path.open("rb") as file:
        file.seek(head.starts[name])
        for first in range(0, shape[0] if width else 0, rows):
            n_rows = min(rows, shape[0] - first)
            room = bytearray(n_rows * width)
            if file.readinto(room) != len(room):
                raise ValueError(f"{path}: truncated while it was read; use another copy.")
            yield first, torch.frombuffer(room, dtype=dtype).view(n_rows, *shape[1:])


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors on the CPU, floats in float32 at least, with W_enc's columns side by side, as it is in our memory.

    Converting and transposing happen slice by slice, so that memory holds the result and one slice.
    """
    head = header(path)
    return {name: tensor(path, head, name) for name in head.shapes}


def tensor(path: Path, head: Header, name: str) -> Tensor:
    shape, dtype = head.shapes[name], getattr(torch, head.dtypes[name], torch.float32)
    whole = room_for(name, shape, dtype)
    as_shape = rows_of_many_axes(shape)
    fill(whole.view(as_shape) if as_shape else whole, slices(path, head, name, as_shape))
    return whole


def room_for(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without values, floats in float32 at least, of W_enc with columns side by side."""
    dtype = at_least_float32(dtype) if dtype.is_floating_point else dtype
    if name in LATENTS_LAST and len(shape) == 2:
        return torch.empty(shape[1], shape[0], dtype=dtype).T
    return torch.empty(shape, dtype=dtype)


def rows_of_many_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The shape in which a tensor of three axes or more is read: its own rows may be half a gigabyte."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 2 else None


def fill(whole: Tensor, slices: Iterator[tuple[int, Tensor]]) -> None:
    """Give a tensor its rows; a scalar is one row."""
    rows = whole if whole.dim() else whole.view(1)
    for first, part in slices:
        rows[first : first + len(part)] = part


def damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path}: damaged or truncated ({error}); use another copy.")
