"""TODO."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from sae_training.text.documents import independent_copy

_ROWS_TO_SNIFF = 100

# Looking into the data --------------------------------------------------------------------------


def _column_kinds(dataset: Any, name: str) -> dict[str, str]:
    """Column -> "string", "integer list" or another word for its values. Reads from a copy."""
    if isinstance(dataset, datasets.Dataset) and not _has_transform(dataset):
        return {column: _feature_kind(dataset.features[column]) for column in dataset.features}
    kinds: dict[str, str] = {}
    for row in _first_rows(dataset, name):
        for column, value in row.items():
            if kinds.get(column, "unknown") == "unknown":
                kinds[column] = _value_kind(value)
        if "unknown" not in kinds.values():
            break
    if not kinds:
        raise _no_rows(name)
    features: dict[str, Any] = dataset.features or {}
    unknown = [column for column in features if kinds.get(column, "unknown") == "unknown"]
    return kinds | {column: _feature_kind(features[column]) for column in unknown}


def _first_rows(dataset: Any, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from itertools.islice(iter(independent_copy(dataset)), _ROWS_TO_SNIFF)
    except (DatasetsError, ValueError) as error:
        raise _unreadable(name, error) from error


def _feature_kind(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Value) and "int" in inner.dtype:
        return "integer list"
    if isinstance(inner, datasets.Value):
        return f"list of {inner.dtype}"
    if isinstance(feature, datasets.Value):
        return "string" if feature.dtype in ("string", "large_string") else feature.dtype
    return type(feature).__name__


def _value_kind(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        return "unknown"
    if isinstance(value, dict | bytes | int | float):
        return type(value).__name__
    array = np.asarray(value)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return "integer list"
    return f"{type(value).__name__} of {array.dtype}"


def _choose_column(kinds: dict[str, str], text_column: str | None, name: str) -> tuple[str, bool]:
    """(column, whether it already holds token ids)."""
    listed = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    if text_column is not None:
        if text_column not in kinds:
            near = get_close_matches(text_column, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"dataset_text_column: {name} has no column {text_column!r}; it has: {listed}{hint}")
        if kinds[text_column] not in ("string", "integer list"):
            raise ValueError(
                f"dataset_text_column: column {text_column!r} of {name} holds {kinds[text_column]} "
                f"values, expected strings or lists of token ids; the columns are: {listed}"
            )
        return text_column, kinds[text_column] == "integer list"
    for column, kind in (
        ("tokens", "integer list"),
        ("input_ids", "integer list"),
        ("text", "string"),
        ("content", "string"),
    ):
        if kinds.get(column) == kind:
            return column, kind == "integer list"
    strings = [column for column, kind in kinds.items() if kind == "string"]
    if len(strings) == 1:
        return strings[0], False
    found = "several columns of strings, none called text or content" if strings else "no text column"
    raise ValueError(
        f"dataset_path: {name} has {found}; its columns are: {listed}; set dataset_text_column to "
        "the one that holds the text (strings) or the token ids (lists of integers)"
    )


def _has_transform(dataset: Any) -> bool:
    """Whether a set_transform makes the rows, whose columns are then known only by reading."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def _no_rows(name: str) -> ValueError:
    return ValueError(f"dataset_path: {name} is empty (0 rows); it must hold text")


def _unreadable(name: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    return ValueError(
        f"dataset_path: {name} could not be read ({type(cause).__name__}: {_first_line(cause)}); "
        "check the data, or open it with datasets.load_dataset and pass the object"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
