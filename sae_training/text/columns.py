"""Find the column of a data set that holds the text, the token ids or the conversations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import datasets
import numpy as np

from sae_training.text.documents import independent_copy
from sae_training.text.row_values import Given, Kind, WrongValue, messages_in

_ROWS_TO_SNIFF = 100
_CHARACTERS_TO_SNIFF = 1_000_000

# Rows without a value tell nothing, so that up to this many are read.
_MOST_ROWS_TO_SNIFF = 10_000

_KIND_OF_TYPE: dict[str, Kind] = {
    "string": "text",
    "list of strings": "text",
    "integer list": "ids",
    "conversation": "chat",
}

# Looked for in this order. Words of a sentence are often in `tokens`, so that only these two hold documents as lists.
_USUAL_COLUMNS = (
    ("tokens", ("integer list",)),
    ("input_ids", ("integer list",)),
    ("text", ("string", "list of strings")),
    ("content", ("string", "list of strings")),
    ("messages", ("conversation",)),
    ("conversations", ("conversation",)),
    ("conversation", ("conversation",)),
)


def find_column(types: dict[str, str], text_column: str | None, given: Given) -> tuple[str, Kind]:
    """(name of the column to read, what it holds). `text_column` None looks for it.

    types: of each column (`column_types`).

    Raises ValueError for a column that is missing or of another type, and where no column or several could be meant.
    """
    listed = ", ".join(f"{column} ({of})" for column, of in types.items())
    if text_column is not None:
        if text_column not in types:
            near = get_close_matches(text_column, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"dataset_text_column: {given.name} has no column {text_column!r}; it has: {listed}{hint}")
        if types[text_column] not in _KIND_OF_TYPE:
            raise ValueError(
                f"dataset_text_column: column {text_column!r} of {given.name} holds {types[text_column]} "
                f"values, expected strings, lists of token ids or conversations; the columns are: {listed}"
            )
        return text_column, _KIND_OF_TYPE[types[text_column]]
    for column, expected in _USUAL_COLUMNS:
        if types.get(column) in expected:
            return column, _KIND_OF_TYPE[types[column]]
    strings = [column for column, of in types.items() if of == "string"]
    if len(strings) == 1:
        return strings[0], "text"
    found = "several columns of strings, none called text or content" if strings else "no text column"
    raise ValueError(
        f"{given.field}: {given.name} has {found}; its columns are: {listed}; set dataset_text_column to the one that "
        "holds the text (strings), the token ids (lists of integers) or the conversations (lists of messages)"
    )


def has_transform(dataset: Any) -> bool:
    """Whether the rows come from a `set_transform`. Their columns are then known only from reading rows."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def column_types(dataset: Any, given: Given) -> dict[str, str]:
    """The type of each column: a key of _KIND_OF_TYPE or another word. Reads rows only where nothing else tells."""
    promised = feature_types(dataset.features or {})
    if isinstance(dataset, datasets.Dataset) and not has_transform(dataset) and "unknown" not in promised.values():
        return promised
    sniffed = types_of_rows(_rows(dataset, given))
    if not sniffed:
        raise given.empty()
    return promised | {column: of for column, of in sniffed.items() if of != "unknown" or column not in promised}


def feature_types(features: Mapping[str, Any]) -> dict[str, str]:
    """The type that each column promises; "unknown" where only rows can tell."""
    return {column: _type_of_feature(feature) for column, feature in features.items()}


def types_of_rows(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The type of each column by its first rows: that of most values, because a bad row may come first."""
    found: dict[str, Counter[str]] = {}
    n_characters = 0
    for number, row in enumerate(itertools.islice(rows, _MOST_ROWS_TO_SNIFF), 1):
        for column, value in row.items():
            counts = found.setdefault(column, Counter())
            if (of := _type_of_value(value)) != "unknown":
                counts[of] += 1
            n_characters += len(value) if isinstance(value, str) else 0
        if (number >= _ROWS_TO_SNIFF or n_characters >= _CHARACTERS_TO_SNIFF) and all(found.values()):
            break
    return {column: counts.most_common(1)[0][0] if counts else "unknown" for column, counts in found.items()}


def _rows(dataset: Any, given: Given) -> Iterator[dict[str, Any]]:
    """The rows, up to the first that cannot be read: whoever comes to that row raises its error."""
    n = 0
    try:
        for row in independent_copy(dataset):
            yield row
            n += 1
    except Exception as error:  # whatever reads the rows: a library, or code of the user
        if n == 0:
            raise given.unreadable(error) from error


def is_plain(feature: Any) -> bool:
    """Whether every row of such a column is a string or a list of integers: Arrow has seen to it."""
    return _type_of_feature(feature) in ("string", "integer list")


def _type_of_feature(feature: Any) -> str:
    """The type that a feature promises; "unknown" where only rows can tell."""
    if isinstance(feature, datasets.Value):
        return "string" if feature.dtype in ("string", "large_string") else feature.dtype
    if isinstance(feature, datasets.Json):
        return "unknown"
    inner = getattr(feature, "feature", None)
    if isinstance(inner, dict) and (inner.keys() >= {"role", "content"} or inner.keys() >= {"from", "value"}):
        return "conversation"
    if isinstance(inner, datasets.Json):
        return "unknown"
    if isinstance(inner, datasets.Value) and "int" in inner.dtype:
        return "integer list"
    if isinstance(inner, datasets.Value):
        return "list of strings" if inner.dtype in ("string", "large_string") else f"list of {inner.dtype}"
    return type(feature).__name__


def _type_of_value(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        return "unknown"
    if isinstance(value, dict | bytes | int | float):
        return {int: "int64", float: "float64"}.get(type(value), type(value).__name__)
    if isinstance(value, list | tuple | np.ndarray):
        items = [item for item in value if item is not None]
        if items and all(isinstance(item, str) for item in items):
            return "list of strings"
        if items and isinstance(items[0], dict):
            try:
                messages_in(value)
            except WrongValue:
                return "list of dicts"
            return "conversation"
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return f"{type(value).__name__} of lists"
    if array.ndim == 1 and array.dtype.kind in "iu":
        return "integer list"
    return f"{type(value).__name__} of {array.dtype}"
