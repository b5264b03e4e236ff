"""Locks between processes. The operating system holds them, so a lock ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sae_training.machine.errors import cannot_write

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class InUse(OSError):
    """Another process holds the lock."""


LETS_GO_WITHIN = 10.0  # seconds after its end: of a killed process the first thread is dead before others close files


def exclusive(path: Path, busy: Callable[[], str], patience: float = 0.0) -> FileLock:
    """Take the lock of the file `path`, until its `release()`. Raise InUse(busy()) if another process has it.

    `patience`: the seconds for which it is waited for.

    On a file system without locks (some of NFS) a warning takes the place of the lock.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise InUse(busy()) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(path.parent, error) from error
        warnings.warn(
            f"{path.parent}: this file system has no locks ({error.strerror}), so nothing keeps a second process from "
            "writing there; start one at a time",
            stacklevel=2,
        )
    return lock


@contextlib.contextmanager
def lock_beside(folder: Path, field: str) -> Iterator[None]:
    """Keep other processes from writing to `folder`, which need not exist. Errors name the config field `field`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{field}: cannot make {folder.parent} ({error.strerror}); give another path.") from error
    lock = exclusive(
        folder.with_name(f".{folder.name}.lock"), lambda: f"{field}: another process is writing {folder}; wait for it."
    )
    try:
        yield
    finally:
        lock.release()
