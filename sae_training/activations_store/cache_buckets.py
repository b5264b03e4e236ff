"""Buckets of rows on disk: each row goes to a random one, and each bucket is then shuffled.

Rows in random buckets, each of which is then shuffled, are in a uniformly random order over the whole cache (Rao 1961;
Sandelius 1962). This takes two passes over the disk and never more than one bucket in memory. Of several processes each
appends to files of its own, and the files of a bucket are shuffled together. Which files there are, and how long they
are, is what the processes have told each other: of a shared disk, one process may see a listing that is out of date.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae_training.machine.files import flush_to_disk
from sae_training.parallel.ranks import rank


class Buckets:
    """`n` buckets of records, rows of `record_bytes` bytes, in `folder`."""

    def __init__(self, folder: Path, n: int, record_bytes: int, seed: int) -> None:
        self.folder, self.n, self.record_bytes, self.seed = folder, n, record_bytes, seed
        self.unflushed: set[int] = set()

    def path(self, b: int, of_rank: int) -> Path:
        return self.folder / (f"{b:05d}-{of_rank}.bin" if of_rank else f"{b:05d}.bin")

    def append(self, number: int, records: np.ndarray) -> None:
        """Append each of the records (n, record_bytes) of pass `number` to a random bucket."""
        bucket = np.random.default_rng([self.seed, number]).integers(self.n, size=len(records))
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(self.n + 1))
        records = records[order]
        self.folder.mkdir(exist_ok=True)
        for b in range(self.n):
            if edges[b] < edges[b + 1]:
                with self.path(b, rank()).open("ab") as file:
                    file.write(records[edges[b] : edges[b + 1]].tobytes())
                self.unflushed.add(b)

    def flush_to_disk(self) -> None:
        """Wait until what was appended is on the disk, where a manifest will count on it."""
        for path in {self.path(b, rank()) for b in self.unflushed}:
            flush_to_disk(path)
        self.unflushed.clear()

    def sizes(self) -> list[int]:
        """Return how many bytes this process has appended to each bucket."""
        paths = (self.path(b, rank()) for b in range(self.n))
        return [path.stat().st_size if path.exists() else 0 for path in paths]

    def cut_back(self, sizes_of_ranks: Sequence[Sequence[int]], first: int, advice: str) -> None:
        """Truncate what was appended to the buckets from `first` on after they had these sizes.

        ValueError, with the `advice`, if some of the rest is missing.
        """
        for of_rank, sizes in enumerate(sizes_of_ranks):
            for b, size in list(enumerate(sizes))[first:]:
                path = self.path(b, of_rank)
                found = path.stat().st_size if path.exists() else 0
                check_long_enough(path, found, size, advice)
                if found > size:
                    with path.open("r+b") as file:
                        file.truncate(size)
        counted = {self.path(b, of_rank) for of_rank in range(len(sizes_of_ranks)) for b in range(self.n)}
        for path in set(self.folder.glob("*.bin")) - counted:  # of a rank that was killed before its first commit
            path.unlink()

    def shuffled(self, b: int, number: int, sizes_of_ranks: Sequence[Sequence[int]], advice: str) -> np.ndarray:
        """Return the records of a bucket in a random order; `number` is a part of the seed.

        ValueError, with the `advice`, if a file is missing or shorter than its size.
        """
        parts = [np.empty(0, np.uint8)]
        for of_rank, sizes in enumerate(sizes_of_ranks):
            if sizes[b]:
                path = self.path(b, of_rank)
                part = np.fromfile(path, np.uint8, sizes[b]) if path.exists() else parts[0]
                check_long_enough(path, len(part), sizes[b], advice)
                parts.append(part)
        records = (parts[-1] if len(parts) <= 2 else np.concatenate(parts)).reshape(-1, self.record_bytes)
        return records[np.random.default_rng([self.seed, number, b]).permutation(len(records))]

    def remove(self, b: int, n_ranks: int) -> None:
        """Delete a bucket to which this many ranks have appended."""
        for of_rank in range(n_ranks):
            self.path(b, of_rank).unlink(missing_ok=True)


def check_long_enough(path: Path, found: int, expected: int, advice: str) -> None:
    if found < expected:
        raise ValueError(f"{path}: found {found} bytes, expected at least {expected}; {advice}")
