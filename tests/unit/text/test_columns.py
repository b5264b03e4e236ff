from __future__ import annotations

from typing import Any

import datasets
import pytest

from sae_training.text.open import open_documents


@pytest.mark.parametrize(
    ("columns", "text_column", "expected"),
    [
        ({"text": ["a"], "tokens": [[1]]}, None, ("tokens", True)),
        ({"text": ["a"], "input_ids": [[1]]}, None, ("input_ids", True)),
        ({"text": ["a"], "tokens": [["a"]]}, None, ("text", False)),
        ({"text": ["a"], "tokens": [[1]]}, "text", ("text", False)),
        ({"content": ["a"], "title": ["b"]}, None, ("content", False)),
        ({"body": ["a"], "year": [1]}, None, ("body", False)),
        ({"ids": [[1]], "text": ["a"]}, "ids", ("ids", True)),
        ({"text": [None, "", "a"], "title": ["x", "y", "z"]}, None, ("text", False)),
        ({"tokens": [[], [1]]}, None, ("tokens", True)),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("kind", ["map", "stream", "stream_without_features"])
def test_column_is_found(columns: dict[str, Any], text_column: str | None, expected: tuple[str, bool], kind: str):
    dataset: Any = datasets.Dataset.from_dict(columns)
    if kind != "map":
        dataset = dataset.to_iterable_dataset()
    if kind == "stream_without_features":
        dataset = dataset.map(lambda row: row)
        assert dataset.features is None
    documents = open_documents(dataset, text_column=text_column)
    assert (documents.column, documents.is_tokenized) == expected
    n_documents = sum(bool(value) for value in columns[documents.column])
    assert len(list(documents.read())) == n_documents


@pytest.mark.parametrize(
    ("columns", "text_column", "message"),
    [
        (
            {"number": [1], "vector": [[0.5]]},
            None,
            r"no text column; its columns are: number \(int64\), vector \(list of float64\).*"
            "set dataset_text_column",
        ),
        ({"title": ["a"], "body": ["b"]}, None, "several columns of strings, none called text"),
        ({"text": ["a"], "number": [1]}, "txt", "no column 'txt'.*did you mean 'text'"),
        ({"text": ["a"], "number": [1]}, "number", "'number' of .* holds int64 values, expected str"),
    ],
    ids=["no_text", "several_strings", "unknown_column", "column_of_numbers"],
)
def test_data_without_a_usable_column_is_an_error(columns: Any, text_column: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        open_documents(datasets.Dataset.from_dict(columns), text_column=text_column)
