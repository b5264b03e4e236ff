"""Pickled files, read without running anything in them: what they hold, in tensors, plain data and stand-ins.

A pickle is a program. `unpickler` builds tensors, plain data and empty stand-ins for the classes of known programs, and
refuses every other name, so that a stranger's file cannot run code. Nor can it fill the memory: archives are not
unpacked beyond what weights are, tensors are not larger than what is stored for them, and values that hold each other
many times over are refused.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from sae_training.formats.torch_files import (
    LEGACY,
    ZIP,
    LimitedReader,
    mapped,
    read_exactly,
    read_legacy,
    read_zip,
    storage_in_bytes,
)
from sae_training.formats.unpickler import Left, StandIn, Storage, Unpickler, refuse
from sae_training.machine.precision import at_least_float32

__all__ = ["StandIn", "copied", "read", "slices", "tensors_by_name"]

OF_OTHER_PROGRAMS = {
    "sparse_autoencoder.autoencoder.": (
        "a state of ai-safety-foundation's sparse_autoencoder: objects of its own classes and of pydantic's, whose "
        "tensors may have an axis of components (several hooks), and of which no stand-ins are made; in that program, "
        "save the tensors of one component as plain ones, torch.save({'encoder.weight': ..., 'encoder.bias': ..., "
        "'decoder.weight': ..., 'bias': tied_bias}, 'ae.pt'), which is the same function in dictionary_learning's names"
    ),
}
"""Modules that files of known programs name, and why these files are not read."""


GZIP = b"\x1f\x8b"  # how a packed file begins
MOST_UNPACKED = 16
"""Bytes from one packed byte, beyond SPARE_BYTES. Weights give 1.1; a bomb of zeros gives 1000."""
SPARE_BYTES = 64 * 2**20
MOST_WRITTEN_OUT = 16 * 2**20  # bytes of all values but tensors, each as often as it would be printed
MOST_VIEWS = 8  # tensors of the same values; tied weights are two
SLICE_BYTES = 16 * 2**20


def read(path: Path) -> Any:
    """What a .pt, .pth, .pkl or .pkl.gz holds. ValueError for a damaged file, and for one that asks for more."""
    try:
        content = read_by_beginning(path)
        check(content)
    except Exception as error:  # whatever the bytes of a stranger make an unpickler raise
        why = " ".join(str(error)[:2000].split())[:500] or type(error).__name__
        known = next((reason for module, reason in OF_OTHER_PROGRAMS.items() if module in why), None)
        told = known or f"not a readable autoencoder file: {why}; use another copy"
        raise ValueError(f"{path}: {told}.") from error
    return content


def read_by_beginning(path: Path) -> Any:
    """Tensors of torch's own files are read from the disk when they are used."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begins = file.read(len(LEGACY))
        file.seek(0)
        if begins.startswith(ZIP):
            return read_zip(path)
        if begins == LEGACY:
            return read_legacy(file, *mapped(path))
    most_bytes = SPARE_BYTES + MOST_UNPACKED * size if begins.startswith(GZIP) else size
    with unpacked(path) as file:
        reader = LimitedReader(file, most_bytes)
        content = Unpickler(reader, most_bytes, from_bytes=storage_in_bytes, left_in=path).load()
        file.read(1)  # the end, where the checksum of a packed file is compared
        return content


def unpacked(path: Path) -> IO[bytes]:
    file = path.open("rb")
    begins = file.read(len(GZIP))
    file.seek(0)
    if begins != GZIP:
        return file
    file.close()
    return cast(IO[bytes], gzip.open(path))


def check(content: Any) -> None:
    """UnpicklingError for values that would take MOST_WRITTEN_OUT bytes and more to print, such as lists in themselves.

    A list of two lists of two lists ... is short in memory, and without end for whoever prints it.
    """
    left, todo, seen = MOST_WRITTEN_OUT, [content], set[int]()
    stored: dict[int, int] = {}
    viewed = 0
    while todo:
        part = todo.pop()
        left -= 64
        if isinstance(part, (str, bytes, Left)):
            left -= len(part)
        elif isinstance(part, int):
            left -= part.bit_length() // 8
        elif isinstance(part, dict):
            todo += part.keys()
            todo += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            todo += part
        elif isinstance(part, StandIn) and id(part) not in seen:  # which is printed without its attributes
            seen.add(id(part))
            todo += vars(part).keys()
            todo += vars(part).values()
        elif isinstance(part, Tensor):
            stored[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
            viewed += part.numel() * part.element_size()
        elif isinstance(part, Storage):
            refuse("values without a shape")
        if left < 0 or 64 * len(todo) > MOST_WRITTEN_OUT:
            refuse("values that hold each other many times over")
    if viewed > MOST_VIEWS * sum(stored.values()) + SLICE_BYTES:
        refuse(f"tensors of {viewed:,} bytes, for which {sum(stored.values()):,} are stored")


def tensors_by_name(content: Any, prefix: str = "", depth: int = 5) -> dict[str, torch.Tensor]:
    """The tensors in dicts of dicts, lists and stand-ins, by their keys with dots between them."""
    found: dict[str, torch.Tensor] = {}
    if isinstance(content, list):
        content = {str(at): part for at, part in enumerate(content)}
    parts = vars(content) if isinstance(content, StandIn) else content
    for key, part in parts.items() if isinstance(parts, dict) and depth else ():
        if isinstance(part, torch.Tensor):
            found[f"{prefix}{key}"] = part
        elif isinstance(key, str):
            found |= tensors_by_name(part, f"{prefix}{key}.", depth - 1)
    return found


def slices(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of a tensor, a few megabytes at a time, each with the index of its first; a scalar is one row.

    What was read of a mapped file is given back after each.
    """
    left: Left | None = getattr(tensor, "left", None)
    release = getattr(tensor, "release", None)
    rows = tensor.detach()
    rows = rows.reshape(1) if rows.dim() == 0 else rows
    n_rows = max(1, SLICE_BYTES // max(1, rows[:1].numel() * rows.element_size()))
    if left is not None and rows.is_contiguous():
        yield from left_rows(left, rows, n_rows)
        return
    rows = rows if left is None else whole_of(left, rows)
    for first in range(0, len(rows), n_rows):
        yield first, rows[first : first + n_rows]
        if release is not None:
            release()


def left_rows(left: Left, like: Tensor, n_rows: int) -> Iterator[tuple[int, Tensor]]:
    """The rows of values that were left in the file, which is unpacked once more as far as they go."""
    try:
        with unpacked(left.path) as file:
            file.seek(left.start)
            for first in range(0, len(like) if like.numel() else 0, n_rows):
                shape = (min(n_rows, len(like) - first), *like.shape[1:])
                room = read_exactly(file, math.prod(shape) * like.element_size())
                yield first, torch.frombuffer(room, dtype=like.dtype).view(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{left.path}: damaged ({error}); use another copy.") from error


def whole_of(left: Left, like: Tensor) -> Tensor:
    """The same of values that lie in another order than rows have, or of which some are no part of the tensor."""
    values = torch.empty(len(left) // like.element_size(), dtype=like.dtype)
    for first, part in left_rows(left, values, SLICE_BYTES // like.element_size()):
        values[first : first + len(part)] = part
    return values.as_strided(like.shape, like.stride())


def copied(tensor: Tensor, transposed: bool = False) -> Tensor:
    """The tensor, or its transpose, in memory of its own and in float32 at least: a file may be mapped."""
    if tensor.dim() == 0:
        _, value = next(slices(tensor))
        return value.reshape(()).to(at_least_float32(tensor.dtype), copy=True)
    shape = tuple(reversed(tensor.shape)) if transposed else tensor.shape
    whole = torch.empty(shape, dtype=at_least_float32(tensor.dtype))
    rows = whole.T if transposed else whole
    for first, part in slices(tensor):
        rows[first : first + len(part)] = part
    return whole
