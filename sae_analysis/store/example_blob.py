"""The examples of one latent as bytes: little-endian arrays one after the other, compressed with zlib.

int32 n, int32 m, then n x (uint8 kind, int64 context, int32 position, int32 number of firings),
then m x int32 positions of firings, then m x float32 activations
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

KINDS = ("top", "quantile 4", "quantile 3", "quantile 2", "quantile 1", "quantile 0", "random", "silent")
"""quantile i: between i / 5 and (i + 1) / 5 of the latent's firings, by activation. silent: it does not fire there."""


class Stored(NamedTuple):
    """n examples with m firings in their windows."""

    kinds: np.ndarray
    """(n,): a place in KINDS"""
    contexts: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    firing_positions: np.ndarray
    """(m,)"""
    firing_values: np.ndarray


TYPES = ("<u1", "<i8", "<i4", "<i4", "<i4", "<f4")


def to_bytes(stored: Stored) -> bytes:
    head = np.array([len(stored.kinds), len(stored.firing_values)], dtype="<i4").tobytes()
    arrays = [np.asarray(array).astype(kind).tobytes() for array, kind in zip(stored, TYPES, strict=True)]
    return zlib.compress(head + b"".join(arrays), 6)


def from_bytes(content: bytes) -> Stored:
    data = zlib.decompress(content)
    n, m = np.frombuffer(data, dtype="<i4", count=2)
    at, arrays = 8, []
    for kind, size in zip(TYPES, (n, n, n, n, m, m), strict=True):
        arrays.append(np.frombuffer(data, dtype=kind, count=size, offset=at))
        at += arrays[-1].nbytes
    return Stored(*arrays)
