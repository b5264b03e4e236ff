"""Which ids of a row count, in data sets of token ids: other columns of the row say it.

    attention_mask        0 at padding
    special_tokens_mask   1 at BOS, EOS, padding and the like
    labels                -100 where an id is no target

Ids that one of them masks are dropped, wherever in the row they stand. Packed rows keep their separators, though
special_tokens_mask masks them (`rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

MASKS = ("attention_mask", "special_tokens_mask", "labels")

SEPARATORS = "special_tokens_mask"
"""The mask that masks the separators of packed rows."""

# What the mask holds at an id that counts, and at one that does not.
_VALUES = {"attention_mask": (1, 0), "special_tokens_mask": (0, 1), "labels": (0, -100)}

_ROWS_TO_SNIFF = 100


class MaskMisfit(ValueError):
    """A mask of a row does not fit its ids."""


def mask_columns(columns: Mapping[str, Any] | None, rows: Any) -> tuple[str, ...]:
    """The columns of a data set that can be masks.

    columns: their features; None if these are not known, and the first of `rows` tell.
    """
    if columns is None:
        names = {name for row in islice(rows, _ROWS_TO_SNIFF) for name, value in row.items() if _is_list(value)}
        return tuple(name for name in MASKS if name in names)
    return tuple(name for name in MASKS if hasattr(columns.get(name), "feature"))


def unread_masks(columns: Mapping[str, Any] | None, rows: Iterable[Mapping[str, Any]], column: str) -> list[str]:
    """Columns of other names that the first of `rows` show to be masks: a 0 or 1 for each id in `column`.

    columns: their features; None if these are not known.
    """
    known = {column, *MASKS, "token_type_ids"}
    if columns is not None and not any(hasattr(columns[name], "feature") for name in columns if name not in known):
        return []
    found: dict[str, set[Any]] = {}
    with contextlib.suppress(Exception):  # whoever comes to a row that cannot be read raises its error
        for row in islice(rows, _ROWS_TO_SNIFF):
            ids: Any = row.get(column)
            for name, value in row.items():
                if name not in known and value is not None and hasattr(ids, "__len__"):
                    found.setdefault(name, set()).update(_numbers(value, len(ids)))
    return [name for name, seen in found.items() if seen == {0, 1} or seen and seen < {0, 1} and "mask" in name.lower()]


def _numbers(values: Any, n: int) -> set[Any]:
    """The values of a list of n numbers; {None} for anything else."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        return {None}
    return set(array.tolist()) if array.shape == (n,) and array.dtype.kind in "biuf" else set() if n == 0 else {None}


def counting_ids(row: Mapping[str, Any], column: str, masks: Sequence[str]) -> Any:
    """The ids in `column` of a row, without those that a mask of the row masks; None if the row has none.

    Raises MaskMisfit for a mask that does not fit the ids.
    """
    ids = row.get(column)
    if ids is None or not masks:
        return ids
    keep = keeps(row, column, masks)
    return ids if keep.all() else np.asarray(ids)[keep].tolist()


def keeps(row: Mapping[str, Any], column: str, masks: Sequence[str]) -> np.ndarray:
    """Which ids in `column` of a row count, bool (n,). Raises MaskMisfit for a mask that does not fit the ids."""
    keep = np.ones(len(row[column]), dtype=bool)
    for mask in masks:
        if row.get(mask) is not None:
            keep &= _keeps(mask, row[mask], len(keep), column)
    return keep


def plain_masks(row: Mapping[str, Any], column: str, masks: Sequence[str]) -> dict[str, list[int] | None]:
    """The masks of a row as lists of integers of the same meaning; None for one that the row lacks.

    Raises MaskMisfit for a mask that does not fit the ids.
    """
    n, found = len(row[column]), {}
    for mask in masks:
        keep = None if row.get(mask) is None else _keeps(mask, row[mask], n, column)
        found[mask] = None if keep is None else np.where(keep, *_VALUES[mask]).tolist()
    return found


def _keeps(mask: str, values: Any, n: int, column: str) -> np.ndarray:
    array = np.asarray(values)
    is_mask = array.ndim == 1 and (array.dtype.kind in "biuf" or array.size == 0)
    if mask == "labels" and (not is_mask or len(array) != n and -100 not in array):
        return np.ones(n, dtype=bool)  # labels of another kind: the class of a row, for instance
    if not is_mask or len(array) != n:
        found = f"{len(array)} values" if is_mask else f"{type(values).__name__} values that are no list of numbers"
        raise MaskMisfit(
            f"{mask}: found {found} for {n} ids in column {column!r}, expected a number for each id; correct the "
            f"column, or remove it to read all ids"
        )
    if mask == "labels":
        return array != -100
    return array == 0 if mask == "special_tokens_mask" else array != 0


def _is_list(value: Any) -> bool:
    return value is not None and not isinstance(value, str | bytes | dict) and np.asarray(value).ndim > 0
