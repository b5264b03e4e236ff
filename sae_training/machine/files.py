"""Files that are whole or absent: written beside their name and renamed, so that the name never holds half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_training.machine.errors import cannot_write

SPARE_BYTES = 16 * 2**20  # left free on the disk for metrics and other small files


class NotEnoughDisk(OSError):
    """There is no room for what was to be written; nothing was written."""


FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left in your share of the disk (quota)",
    errno.EFBIG: "no space left for a file of that size (limit of the system)",
}


@contextlib.contextmanager
def disk_named(*folders: Path, then: str | None = None) -> Iterator[None]:
    """Raise NotEnoughDisk, which names a folder and what to do, for an error of the block that a full disk caused.

    Of an open file Python says "[Errno 28] No space left on device" without its name, and safetensors and pyarrow have
    errors of their own. Of several `folders` that the block writes to, the one with the least room is named. `then`
    says how to go on once there is room, as a note.
    """
    try:
        yield
    except NotEnoughDisk as error:
        if then is not None:
            error.add_note(then)
        raise
    except Exception as error:
        if (why := why_full(error)) is None:
            raise
        folder = min(folders, key=free_bytes)
        free = f"{megabytes(free_bytes(folder))} are free"
        if has_no_inodes(folder):
            free += ", but no entry for another file (inodes)"
        told = NotEnoughDisk(
            f"{folder}: {why}, {free}; delete what is no longer needed there (old runs, checkpoints, caches), or write "
            "to another disk."
        )
        if then is not None:
            told.add_note(then)
        raise told from error


def why_full(error: BaseException) -> str | None:
    """Return in what way the disk is full, if that caused the error or one that it came from; else None."""
    number = getattr(error, "errno", None)
    if isinstance(error, (OSError, SafetensorError)) and number is None:
        written = re.search(r"(?:os error|[Ee]rrno) (\d+)", str(error))
        number = int(written[1]) if written else None
    if isinstance(error, (OSError, SafetensorError)) and number in FULL:
        return FULL[number]
    if getattr(error, "sqlite_errorname", None) == "SQLITE_FULL":
        return FULL[errno.ENOSPC]
    before = error.__cause__ or error.__context__
    return None if before is None else why_full(before)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` if the block ends without an error, else it is removed."""
    partial = path.with_name(path.name + ".tmp")
    with disk_named(path.parent):
        try:
            yield partial
            os.replace(partial, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise cannot_write(path.parent, error) from error
            raise


def write_text(path: Path, text: str, last: bool = False) -> None:
    """Write a file. `last`: wait until it is on the disk, because nothing writes it again after a power cut."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
        if last:
            flush_to_disk(partial)
    if last:
        flush_to_disk(path.parent)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file and wait until it is on the disk: what it takes the place of may go then."""
    with written_beside(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # whatever kept the system from writing
            raise OSError(f"{path}: could not be written ({error}).") from error
        partial.chmod(0o644)  # safetensors makes it 600, which colleagues on a shared disk cannot read
        flush_to_disk(partial)
    flush_to_disk(path.parent)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); use another copy.") from error


def sha256(path: Path, between: Callable[[], None] = lambda: None) -> str:
    """Return the hash of a file; `between` is called after each 16 MB (10 ms), and may raise."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
            between()
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until the file or folder is on the disk, not only in the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree_to_disk(folder: Path) -> None:
    """Wait until all files and folders in `folder`, and itself, are on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        flush_to_disk(path)
    flush_to_disk(folder)


def check_free_disk(folder: Path, n_bytes: int, what: str = "a checkpoint needs", setting: str = "run_dir") -> None:
    """Raise NotEnoughDisk unless `n_bytes` and SPARE_BYTES fit on the disk of `folder`, which need not exist yet."""
    needed = n_bytes + SPARE_BYTES
    if (free := free_bytes(folder)) < needed:
        raise NotEnoughDisk(
            f"{folder}: {what} {megabytes(needed)}, but {megabytes(free)} are free; "
            f"free some space, or set {setting} to another disk."
        )


def free_bytes(folder: Path) -> int:
    """Return how much room there is on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def has_no_inodes(folder: Path) -> bool:
    """Return whether the disk of `folder` takes no more files, however small."""
    if not hasattr(os, "statvfs"):  # Windows
        return False
    found = os.statvfs(next(p for p in (folder, *folder.absolute().parents) if p.exists()))
    return found.f_files > 0 and found.f_favail == 0


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def step_number(path: Path) -> int:
    """The n of a folder named step_<n>; -1 for other names, such as that of a folder that was never completed."""
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1
