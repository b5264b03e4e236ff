"""Files of numpy arrays (.npz), read without pickles and without more memory than the file's own size warrants.

A .npz is a zip of .npy members, each with a header of its own that declares a precision and a shape. All headers are
compared with what the zip says of its members before an array is made.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from sae_training.formats.safetensors_files import Header
from sae_training.formats.torch_files import SmallReads

MOST_MEMBERS = 64
EXPANDS = 20  # times; compressed weights shrink by a tenth, biases of zeros by a thousand, but these are small
MARGIN = 2**20  # bytes that any file may expand to

PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_HEADER_BYTES = 10_240  # of an array; numpy's own limit is 10,000

HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def header(path: Path) -> Header:
    """Names, precisions and shapes of the arrays. ValueError for a damaged file, and for one that declares too much."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    with opened(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                head = io.BytesIO(file.read(MOST_HEADER_BYTES))
                shape, dtype = declared(head)
                expected = head.tell() + math.prod(shape) * dtype.itemsize
            if member.file_size != expected:
                raise ValueError(f"{path}: {name} has {member.file_size:,} bytes, expected {expected:,} by its shape.")
            shapes[name], dtypes[name] = shape, dtype.name
    return Header(shapes, dtypes, {})


def tensors(path: Path, only: str | None = None) -> dict[str, Tensor]:
    """All arrays, or `only` the one of a name, on the CPU."""
    header(path)  # which refuses what must not be read
    made = {}
    with opened(path) as archive:
        for member in archive.infolist():
            if only is not None and member.filename != f"{only}.npy":
                continue
            with archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # the end, where the checksum is compared
            made[member.filename.removesuffix(".npy")] = torch.from_numpy(
                np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            )
    return made


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
    strange = next((name for name in names if not name.endswith(".npy") or "/" in name or "\\" in name), None)
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


def declared(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and precision in the header of a .npy. ValueError for one of objects, whole numbers or structures."""
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise ValueError(f"an array of version {version}, expected 1.0 or 2.0")
    try:
        shape, _, dtype = HEADER_READERS[version](file)
    except Exception as error:  # numpy parses it as Python: also with tokens that end nowhere
        raise ValueError(f"an array whose header is not numpy's ({type(error).__name__})") from error
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise ValueError(f"an array of {dtype}, expected float16, float32 or float64")
    if any(size < 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, dtype


def damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path}: damaged, truncated or no .npz of weights ({error}); use another copy.")
