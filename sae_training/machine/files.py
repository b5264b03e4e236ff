"""TODO."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_training.machine.memory import megabytes


@contextlib.contextmanager
def lock_beside(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder; the lock ends with the process, however that ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cached_activations_path: cannot make {folder.parent} ({error.strerror}); give another path."
        ) from error
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"cached_activations_path: another process is writing {folder}; wait for it.") from error
    try:
        yield
    finally:
        lock.release()


def step_number(path: Path) -> int:
    """The n of a folder step_<n>; -1 for other names (a folder that was being written when the run was killed)."""
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


# ------------------------------------------------------------------------------------------------------- small files


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); use another copy.") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write beside `path` and rename, so that the name never holds half a file."""
    partial = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors makes it 600, which colleagues on a shared disk cannot read
        os.replace(partial, path)
    except SafetensorError as error:  # its word for any failure of the system to write
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error}); free some space.") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Like `write_safetensors`, for text."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


SPARE_BYTES = 16 * 2**20  # left free beside a checkpoint, for metrics and the final weights' small files


class NotEnoughDisk(OSError):
    """There is no room for a checkpoint; nothing was written."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_disk(folder: Path, n_bytes: int, what: str = "a checkpoint needs", setting: str = "run_dir") -> None:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes + SPARE_BYTES:
        raise NotEnoughDisk(
            f"{folder}: {what} {megabytes(n_bytes + SPARE_BYTES)}, but {megabytes(free)} are free; "
            f"free some space, or set {setting} to another disk."
        )
