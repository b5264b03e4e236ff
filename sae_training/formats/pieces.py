"""Safetensors files, written a slice at a time, by one process or by several that each hold some of the latents.

Each process writes the bytes of its latents into the one file, and reads those of its latents from it, so that none
ever holds all of them, and any number of processes can go on with what any other number has written. The format
is that of safetensors, whose own writer keeps all other threads of the process waiting until all is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sae_training.formats.safetensors_files import DTYPES, SLICE_BYTES
from sae_training.formats.safetensors_files import header as read_header
from sae_training.parallel.shard import BY_LATENT, Shard

COUNTERS = ("steps_since_fired", "tokens_since_fired", "fired", "fired_last_window")  # of each latent
CODES = {dtype: code for code, dtype in DTYPES.items()}


def axis_of(name: str, n_axes: int) -> int | None:
    """Return the axis of a tensor on which latents lie, by its name in a state (a/b/exp_avg.W_enc); None: on none."""
    of_optimizer, _, last = name.rpartition("/")[2].rpartition(".")
    if n_axes == 0 or last not in (*BY_LATENT, *COUNTERS):
        return None
    return 1 if last == "W_enc" and not of_optimizer else 0  # moments lie in memory latent by latent, as W_enc does


def whole_shape(name: str, tensor: Tensor, shard: Shard) -> tuple[int, ...]:
    """Return the shape that a tensor has with all latents."""
    if shard.is_all:
        return tuple(tensor.shape)
    axis = axis_of(name, tensor.ndim)
    return tuple(shard.d_sae if i == axis else n for i, n in enumerate(tensor.shape))


def own_part(name: str, tensor: Any, shape: list[int] | tuple[int, ...], shard: Shard) -> Tensor:
    """Return the part of a tensor of all latents, of this `shape`, that is the shard's."""
    axis = axis_of(name, len(shape))
    return tensor[tuple(shard.own if i == axis else slice(None) for i in range(len(shape)))]


def read(path: Path, shard: Shard) -> dict[str, Tensor]:
    """Return the tensors of a file, of those of all latents the shard's part."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
        shapes = {name: piece.get_shape() for name, piece in slices.items()}
        return {
            name: own_part(name, piece, shapes[name], shard) if shapes[name] else file.get_tensor(name)
            for name, piece in slices.items()
        }


def begin(path: Path, tensors: Mapping[str, Tensor], shard: Shard) -> None:
    """Make the file, as long as it will be, for one process's `tensors` and those of its peers: its header alone."""
    entries, end = {}, 0

    def place(name: str) -> tuple[int, bool, str]:  # as safetensors orders them: the widest first, so aligned
        return -tensors[name].element_size(), tensors[name].is_floating_point(), name

    for name, tensor in ((name, tensors[name]) for name in sorted(tensors, key=place)):
        shape, start = whole_shape(name, tensor, shard), end
        end += math.prod(shape) * tensor.element_size()
        if tensor.dtype not in CODES:
            raise TypeError(f"{path}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, CODES))}.")
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def fill(path: Path, tensors: Mapping[str, Tensor], shard: Shard) -> None:
    """Write the shard's bytes into the file that one of the processes has begun; the first writes what is of none."""
    starts = read_header(path).starts
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            if axis_of(name, tensor.ndim) is not None or shard.rank == 0:
                for offset, data in stretches(name, tensor, shard):
                    file.seek(starts[name] + offset)
                    file.write(data)
        file.flush()
        os.fsync(file.fileno())  # because who completes the checkpoint may be another machine


def stretches(name: str, tensor: Tensor, shard: Shard) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of the shard's part of a tensor, and where in the whole tensor they begin."""
    size, axis = tensor.element_size(), None if shard.is_all else axis_of(name, tensor.ndim)
    at_once = max(1, SLICE_BYTES // max(1, tensor[:1].numel() * size if tensor.ndim else 1))
    if axis == 1:
        for first in range(0, len(tensor), at_once):
            for number, row in enumerate(as_bytes(row) for row in tensor[first : first + at_once].cpu()):
                yield ((first + number) * shard.d_sae + shard.first) * size, row
        return
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    before = shard.first if axis == 0 else 0
    for first in range(0, len(rows), at_once):
        yield (before + first) * rows[:1].numel() * size, as_bytes(rows[first : first + at_once])


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
