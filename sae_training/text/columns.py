"""Find the column of a data set that holds the text or the token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from sae_training.text.documents import Given, independent_copy

_ROWS_TO_SNIFF = 100

# Looked for in this order.
_USUAL_COLUMNS = (
    ("tokens", "integer list"),
    ("input_ids", "integer list"),
    ("text", "string"),
    ("content", "string"),
)


def find_column(dataset: Any, text_column: str | None, given: Given) -> tuple[str, bool]:
    """(name of the column to read, whether it holds token ids). `text_column` None looks for it.

    Raises ValueError for a column that is missing or of another type, and where no column or several could be meant.
    """
    types = _column_types(dataset, given)
    listed = ", ".join(f"{column} ({of})" for column, of in types.items())
    if text_column is not None:
        if text_column not in types:
            near = get_close_matches(text_column, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"dataset_text_column: {given.name} has no column {text_column!r}; it has: {listed}{hint}")
        if types[text_column] not in ("string", "integer list"):
            raise ValueError(
                f"dataset_text_column: column {text_column!r} of {given.name} holds {types[text_column]} "
                f"values, expected strings or lists of token ids; the columns are: {listed}"
            )
        return text_column, types[text_column] == "integer list"
    for column, expected in _USUAL_COLUMNS:
        if types.get(column) == expected:
            return column, expected == "integer list"
    strings = [column for column, of in types.items() if of == "string"]
    if len(strings) == 1:
        return strings[0], False
    found = "several columns of strings, none called text or content" if strings else "no text column"
    raise ValueError(
        f"{given.field}: {given.name} has {found}; its columns are: {listed}; set dataset_text_column to "
        "the one that holds the text (strings) or the token ids (lists of integers)"
    )


def has_transform(dataset: Any) -> bool:
    """Whether the rows come from a `set_transform`. Their columns are then known only from reading rows."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def _column_types(dataset: Any, given: Given) -> dict[str, str]:
    """The type of each column: "string", "integer list" or another word. Reads rows only where nothing else tells."""
    if isinstance(dataset, datasets.Dataset) and not has_transform(dataset):
        return {column: _type_of_feature(dataset.features[column]) for column in dataset.features}
    types: dict[str, str] = {}
    for row in _first_rows(dataset, given):
        for column, value in row.items():
            if types.get(column, "unknown") == "unknown":
                types[column] = _type_of_value(value)
        if "unknown" not in types.values():
            break
    if not types:
        raise given.empty()
    features: dict[str, Any] = dataset.features or {}
    unknown = [column for column in features if types.get(column, "unknown") == "unknown"]
    return types | {column: _type_of_feature(features[column]) for column in unknown}


def _first_rows(dataset: Any, given: Given) -> Iterator[dict[str, Any]]:
    try:
        yield from itertools.islice(iter(independent_copy(dataset)), _ROWS_TO_SNIFF)
    except (DatasetsError, ValueError) as error:
        raise given.unreadable(error) from error


def _type_of_feature(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Value) and "int" in inner.dtype:
        return "integer list"
    if isinstance(inner, datasets.Value):
        return f"list of {inner.dtype}"
    if isinstance(feature, datasets.Value):
        return "string" if feature.dtype in ("string", "large_string") else feature.dtype
    return type(feature).__name__


def _type_of_value(value: Any) -> str:
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
