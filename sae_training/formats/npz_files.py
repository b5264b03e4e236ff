"""Files of numpy arrays (.npz), read without pickles and without more memory than the file's own size warrants.

A .npz is a zip of .npy members, each with a header of its own that declares a precision and a shape. All headers are
compared with what the zip says of its members before an array is made.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from sae_training.formats.safetensors_files import SLICE_BYTES, Header, fill, room_for, rows_of_many_axes
from sae_training.formats.torch_files import SmallReads, read_exactly

ENDING = ".npy"  # of the members

MOST_MEMBERS = 64
EXPANDS = 20  # times; compressed weights shrink by a tenth, biases of zeros by a thousand, but these are small
MARGIN = 2**20  # bytes that any file may expand to

PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_HEADER_BYTES = 10_240  # of an array; numpy's own limit is 10,000

HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Declared:
    """What the header of an array says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_by_columns: bool
    """Its first axis is the one whose values lie side by side, as in Fortran."""
    n_bytes: int
    """Length of the header; the values follow."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype.name)


def header(path: Path) -> Header:
    """Names, precisions and shapes of the arrays. ValueError for a damaged file, and for one that declares too much."""
    arrays = declared_in(path)
    shapes = {name: array.shape for name, array in arrays.items()}
    return Header(shapes, {name: array.dtype.name for name, array in arrays.items()}, {})


def declared_in(path: Path) -> dict[str, Declared]:
    """The headers of all arrays, by name. ValueError as for `header`."""
    arrays: dict[str, Declared] = {}
    with opened(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(ENDING)
            with archive.open(member) as file:
                array = declared(io.BytesIO(file.read(MOST_HEADER_BYTES)))
            expected = array.n_bytes + math.prod(array.shape) * array.dtype.itemsize
            if member.file_size != expected:
                raise ValueError(f"{path}: {name} has {member.file_size:,} bytes, expected {expected:,} by its shape.")
            arrays[name] = array
    return arrays


def tensors(path: Path) -> dict[str, Tensor]:
    """All arrays on the CPU, in float32 at least, with W_enc's columns side by side, as it is in our memory.

    Unpacking, converting and transposing happen slice by slice, so that memory holds the result and one slice.
    """
    return {name: tensor(path, name, array) for name, array in declared_in(path).items()}


def tensor(path: Path, name: str, array: Declared) -> Tensor:
    whole = room_for(name, array.shape, array.torch_dtype)
    if array.is_by_columns:
        axes = tuple(reversed(range(len(array.shape))))
        fill(whole.permute(axes), stored(path, name, array, array.shape[::-1]))
        return whole
    as_shape = rows_of_many_axes(array.shape)
    fill(whole.view(as_shape) if as_shape else whole, stored(path, name, array, as_shape or array.shape))
    return whole


def slices(path: Path, name: str) -> Iterator[tuple[int, Tensor]]:
    """The rows of an array in order, a few megabytes at a time, each with the index of its first; a scalar is one row.

    One by columns is read as a whole.
    """
    array = declared_in(path)[name]
    if array.is_by_columns and len(array.shape) > 1:
        yield 0, tensor(path, name, array)
    else:
        yield from stored(path, name, array, array.shape)


def stored(path: Path, name: str, array: Declared, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The values of an array in the order of the file, as rows of this shape. ValueError if they are damaged."""
    shape = shape or (1,)
    width = array.dtype.itemsize * math.prod(shape[1:])
    n_rows = max(1, SLICE_BYTES // max(1, width))
    with opened(path) as archive, archive.open(name + ENDING) as file:
        file.read(array.n_bytes)
        for first in range(0, shape[0] if width else 0, n_rows):
            rows = min(n_rows, shape[0] - first)
            values = np.frombuffer(read_exactly(file, rows * width), dtype=array.dtype)
            native = values.astype(array.dtype.newbyteorder("="), copy=False)
            yield first, torch.from_numpy(native).view(rows, *shape[1:])
        file.read(1)  # the end, where the checksum is compared


class opened:  # noqa: N801 - used as a function
    """The zip at `path`, whose members are few, named plainly, and no larger than the file warrants; errors name it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> zipfile.ZipFile:
        try:
            self.file = SmallReads(self.path)
            self.archive = zipfile.ZipFile(cast(IO[bytes], self.file))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise damaged(self.path, error) from error
        try:
            check_members(self.path, self.archive.infolist())
        except ValueError:
            self.close()
            raise
        return self.archive

    def close(self) -> None:
        self.archive.close()
        self.file.close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()
        if isinstance(error, (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)):
            raise damaged(self.path, error) from error
        if isinstance(error, ValueError) and not str(error).startswith(str(self.path)):
            raise damaged(self.path, error) from error


def check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    on_disk = path.stat().st_size
    names = [member.filename for member in members]
    if not 0 < len(names) <= MOST_MEMBERS or len({*names}) < len(names):
        raise ValueError(f"{path}: holds {len(names)} arrays, expected 1 to {MOST_MEMBERS} with names of their own.")
    strange = next((name for name in names if not name.endswith(ENDING) or "/" in name or "\\" in name), None)
    if strange is not None:
        raise ValueError(f"{path}: holds {strange!r}, expected arrays (.npy) alone.")
    packed = next((m for m in members if m.compress_type not in PACKED or m.flag_bits & 1), None)
    if packed is not None:
        raise ValueError(f"{path}: {packed.filename!r} is encrypted or packed in a way that numpy does not know.")
    if sum(member.compress_size for member in members) > on_disk:
        raise ValueError(f"{path}: its parts are larger than the {on_disk:,} bytes of the file; use another copy.")
    size = sum(member.file_size for member in members)
    if size > EXPANDS * on_disk + MARGIN:
        raise ValueError(f"{path}: {on_disk:,} bytes that would expand to {size:,}, which no weights do; check it.")


def declared(file: IO[bytes]) -> Declared:
    """What the header of a .npy says. ValueError for one of objects, whole numbers or structures."""
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise ValueError(f"an array of version {version}, expected 1.0 or 2.0")
    try:
        shape, is_by_columns, dtype = HEADER_READERS[version](file)
    except Exception as error:  # numpy parses it as Python: also with tokens that end nowhere
        raise ValueError(f"an array whose header is not numpy's ({type(error).__name__})") from error
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise ValueError(f"an array of {dtype}, expected float16, float32 or float64")
    if any(size < 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    return Declared(shape, dtype, is_by_columns, file.tell())


def damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path}: damaged, truncated or no .npz of weights ({error}); use another copy.")
