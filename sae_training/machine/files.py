"""Files that are whole or absent: written beside their name and renamed, so that the name never holds half a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SPARE_BYTES = 16 * 2**20  # left free on the disk for metrics and other small files


class NotEnoughDisk(OSError):
    """There is no room for what was to be written; nothing was written."""


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` if the block ends without an error, else it is removed."""
    partial = path.with_name(path.name + ".tmp")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with written_beside(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # whatever kept the system from writing
            raise OSError(f"{path}: could not be written ({error}); free some space.") from error
        partial.chmod(0o644)  # safetensors makes it 600, which colleagues on a shared disk cannot read


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); use another copy.") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until the file or folder is on the disk, not only in the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_disk(folder: Path, n_bytes: int, what: str = "a checkpoint needs", setting: str = "run_dir") -> None:
    """Raise NotEnoughDisk unless `n_bytes` and SPARE_BYTES fit on the disk of `folder`, which need not exist yet."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, n_bytes + SPARE_BYTES
    if free < needed:
        raise NotEnoughDisk(
            f"{folder}: {what} {megabytes(needed)}, but {megabytes(free)} are free; "
            f"free some space, or set {setting} to another disk."
        )


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def step_number(path: Path) -> int:
    """The n of a folder named step_<n>; -1 for other names, such as that of a folder that was never completed."""
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1
