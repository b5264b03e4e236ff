"""Files of torch.save: zip archives of today, and what was written before 1.6, read without torch.load.

Both are a program (`unpickler`) and the values of storages apart from it. torch.load would make room for whatever a
file says, also with weights_only: bytearray is among the names that it knows. The values of large files stay on the
disk until they are copied.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from sae_training.formats.unpickler import Left, Storage, StorageType, Unpickler, refuse, storage_of

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of either kind begins. The second is a pickle of a number."""

MOST_PICKLED_BYTES = 64 * 2**20  # of the program, which is apart from the weights
MOST_AT_ONCE = 4 * 2**20  # the directory of an archive: that of 40,000 files; weights have some hundred
MOST_COPIED = 2**20  # bytes

Release = Callable[[], None]


class LimitedReader:
    """The part of a file's face that an unpickler uses; EOFError beyond a number of bytes. `at` were read so far."""

    def __init__(self, file: IO[bytes], most_bytes: int) -> None:
        self.file, self.left, self.at = file, most_bytes, 0

    def counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        self.at += len(data)
        if self.left < 0:
            raise EOFError("unpacks to far more than weights do")
        return data

    def read(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            raise EOFError(f"asks for {n_bytes:,} bytes at once, more than its size allows")
        return self.counted(self.file.read(n_bytes))

    def readline(self) -> bytes:
        return self.counted(self.file.readline(self.left + 1))


class SmallReads(io.FileIO):
    """A file that is not read in large pieces: a zip's directory can be as large as the file, and take more memory."""

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        data = super().read(MOST_AT_ONCE + 1 if size is None or size < 0 else min(size, MOST_AT_ONCE + 1)) or b""
        if len(data) > MOST_AT_ONCE:
            raise zipfile.BadZipFile(f"a directory of more than {MOST_AT_ONCE:,} bytes")
        return data


def read_exactly(file: IO[bytes], n_bytes: int) -> bytearray:
    """The next bytes of a file, in small pieces, which the readers of packed files copy. EOFError if there are less."""
    room = bytearray(n_bytes)
    for start in range(0, n_bytes, MOST_COPIED):
        part = memoryview(room)[start : start + MOST_COPIED]
        if cast(Any, file).readinto(part) != len(part):
            raise EOFError("truncated while it was read")
    return room


def mapped(path: Path) -> tuple[Tensor, Release | None]:
    """The bytes of a file without reading them, and a function that gives back the memory of what was read."""
    with path.open("rb") as file:
        there = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    dont_need = getattr(mmap, "MADV_DONTNEED", None)
    release = None if dont_need is None else lambda: there.madvise(dont_need)
    return torch.frombuffer(there, dtype=torch.uint8), release


# ---------------------------------------------------------------------------------------------------------------- zip


def read_zip(path: Path) -> Any:
    """What a zip archive holds. UnpicklingError or BadZipFile unless it is as torch writes it."""
    with SmallReads(path) as file, zipfile.ZipFile(cast(IO[bytes], file)) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        check_archive(archive.infolist())
        programs = [name for name in parts if name.endswith("/data.pkl")]
        if len(programs) != 1:
            refuse(f"an archive with {len(programs)} programs (data.pkl), expected one")
        folder = programs[0].removesuffix("/data.pkl")
        if f"{folder}/constants.pkl" in parts:
            refuse("a program of TorchScript, not weights")
        program = archive.read(programs[0])
        order = archive.read(f"{folder}/byteorder") if f"{folder}/byteorder" in parts else b"little"
    if order != b"little":
        refuse(f"bytes in the order {order[:20]!r}, expected little")
    data, release = mapped(path)
    made: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        dtype, key, n_values = described(pid)
        part = parts.get(f"{folder}/data/{key}") or refuse(f"the storage {key[:40]!r} is missing")
        if n_values * dtype.itemsize > part.file_size:
            refuse(f"declares {n_values:,} values, for which {part.file_size:,} bytes are stored")
        if key not in made:
            start = start_of(data, part)
            made[key] = storage_of(data[start : start + n_values * dtype.itemsize], dtype, release)
        return made[key] if made[key].values.dtype == dtype else refuse("a storage of two kinds")

    return Unpickler(LimitedReader(io.BytesIO(program), len(program)), len(program), storage).load()


def check_archive(parts: list[zipfile.ZipInfo]) -> None:
    """UnpicklingError unless an archive is as torch writes it: nothing packed, plain names, a small program."""
    names = [part.filename for part in parts]
    for part in parts:
        name = part.filename
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            refuse(f"{name!r} in the archive is packed, which torch never does")
        if part.flag_bits & 1:
            refuse(f"{name!r} in the archive is encrypted")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            refuse(f"{name!r} in the archive points out of it")
        if name.endswith((".pkl", "byteorder")) and part.file_size > MOST_PICKLED_BYTES:
            refuse(f"{name!r} in the archive has {part.file_size:,} bytes beside the weights")
    if len(set(names)) < len(names):
        refuse("the archive holds several files of one name")


def start_of(data: Tensor, part: zipfile.ZipInfo) -> int:
    """Where in an archive the bytes of a part begin: after its name and what its own header adds."""
    at = part.header_offset
    head = bytes(data[at : at + 30].tolist())
    start = at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if len(head) < 30 or head[:4] != ZIP or start + part.file_size > len(data):
        refuse(f"{part.filename[:40]!r} lies beyond the end of the archive; it is truncated")
    return start


def described(pid: Any) -> tuple[torch.dtype, str, int]:
    """Precision, key and number of values of a storage, as a program names it."""
    match pid:
        case ("storage", StorageType(dtype), str(key), str(), int(n_values)) if n_values >= 0:
            return dtype, key, n_values
        case ("storage", StorageType(dtype), str(key), str(), int(n_values), None) if n_values >= 0:
            return dtype, key, n_values
    return refuse("names something that is no storage of plain numbers")


# ------------------------------------------------------------------------------------------------------------- legacy


def read_legacy(file: IO[bytes], data: Tensor, release: Release | None = None, left: Left | None = None) -> Any:
    """What a file of torch before 1.6 holds: pickles of a number, of a version, of the machine, of the content and of
    the storages' keys, then each storage with its length. `data` are the bytes of the whole file, which are on the
    device meta if they were `left` where they lie.
    """
    size = len(data)
    if one_pickle(file, size) != 0x1950A86A20F9469CFC6C or one_pickle(file, size) != 1001:
        refuse("no file of torch")
    machine = one_pickle(file, size)
    if not isinstance(machine, dict) or machine.get("little_endian", True) is not True:
        refuse("bytes of another order, expected little")
    start = file.tell()
    kinds: dict[str, tuple[torch.dtype, int]] = {}

    def noted(pid: Any) -> None:
        dtype, key, n_values = described(pid)
        if kinds.setdefault(key, (dtype, n_values)) != (dtype, n_values):
            refuse("a storage of two kinds")

    one_pickle(file, size, noted, is_dry=True)
    keys = one_pickle(file, size)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len({*keys}) < len(keys):
        refuse("no list of storages")
    made: dict[str, Storage] = {}
    for key in keys:
        if key not in kinds:
            refuse("a storage that nothing uses")
        dtype, n_values = kinds[key]
        stated, first = int.from_bytes(file.read(8), "little"), file.tell()
        end = first + n_values * dtype.itemsize
        if stated != n_values or end > size:
            refuse(f"declares {n_values:,} values, expected {stated:,} within {size:,} bytes; it is truncated")
        made[key] = storage_of(data[first:end], dtype, release, left.part(first, end - first) if left else None)
        file.seek(end)
    file.seek(start)
    return one_pickle(file, size, lambda pid: made.get(described(pid)[1]) or refuse("a storage that is missing"))


def one_pickle(file: IO[bytes], size: int, persistent: Callable[[Any], Any] | None = None, is_dry: bool = False) -> Any:
    most = min(size, MOST_PICKLED_BYTES)
    return Unpickler(LimitedReader(file, most), most, persistent, is_dry=is_dry).load()


def storage_in_bytes(content: bytes | Left) -> Storage:
    """A storage that a plain pickle holds as a file of torch's own."""
    left = content if isinstance(content, Left) else None
    head = content.head if isinstance(content, Left) else content
    if not head.startswith(LEGACY):
        refuse("a storage in no form of torch's")
    if left is not None:
        data = torch.empty(len(left), dtype=torch.uint8, device="meta")
    else:
        data = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    made = read_legacy(io.BytesIO(head), data, left=left)
    return made if isinstance(made, Storage) else refuse("bytes that are no storage")
