"""Buckets of two processes, whose files are all there and whole, or are missed by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sae_training.activations_store.cache_buckets import Buckets

RECORDS = np.arange(40, dtype=np.uint8).reshape(10, 4)


@pytest.fixture
def buckets(tmp_path: Path) -> Buckets:
    """One bucket, to which two processes have appended the same records."""
    made = Buckets(tmp_path / "buckets", 1, RECORDS.shape[1], seed=0)
    made.append(0, RECORDS)
    shutil.copyfile(made.path(0, 0), made.path(0, 1))
    return made


def test_a_bucket_holds_what_the_processes_have_counted(buckets: Buckets) -> None:
    with buckets.path(0, 1).open("ab") as file:
        file.write(b"rest")  # of a pass that does not count
    for sizes, expected in (([[40], [40]], [*RECORDS, *RECORDS]), ([[40], [0]], RECORDS), ([[0], [0]], [])):
        found = buckets.shuffled(0, 5, sizes, "")
        assert sorted(found.tolist()) == sorted(record.tolist() for record in expected)
    buckets.remove(0, 2)
    assert list(buckets.folder.iterdir()) == []


@pytest.mark.parametrize("of_rank", [0, 1])
def test_a_file_that_is_missing_or_short_is_an_error(of_rank: int, buckets: Buckets) -> None:
    path = buckets.path(0, of_rank)
    os.truncate(path, 36)
    with pytest.raises(ValueError, match=f"^{path}: found 36 bytes, expected at least 40; look for it."):
        buckets.shuffled(0, 5, [[40], [40]], "look for it.")
    path.unlink()
    with pytest.raises(ValueError, match=f"^{path}: found 0 bytes, expected at least 40; look for it."):
        buckets.shuffled(0, 5, [[40], [40]], "look for it.")
