from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_training.text.documents import Documents
from sae_training.text.open import open_documents
from sae_training.text.row_values import BadData, Given, WrongValue, describe, documents_in

# What a user could write in a column of text, and what its documents are; None where the row is bad.

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
LISTS = st.lists(TEXTS | st.none(), max_size=4)
DICTS = st.dictionaries(TEXTS, TEXTS | NUMBERS, max_size=3)
BAD_LISTS = st.lists(TEXTS | NUMBERS | LISTS | DICTS, min_size=1, max_size=4)
VALUES = st.none() | TEXTS | NUMBERS | LISTS | DICTS | BAD_LISTS


# The value of a row without the column: what it is called there instead, people misspell.
MISSING = {"txt": "c"}


def expected_documents(value: Any) -> list[str] | None:
    if value is None:
        return []
    values = [item for item in value if item is not None] if isinstance(value, list) else [value]
    return values if all(isinstance(item, str) for item in values) else None


def non_empty(documents: list[list[str] | None]) -> list[str]:
    return [text for of_row in documents for text in of_row or [] if text]


def generated(values: list[Any], folder: Path) -> Any:
    return datasets.IterableDataset.from_generator(lambda: ({"text": value} for value in values))


def by_a_transform(values: list[Any], folder: Path) -> Any:
    dataset = datasets.Dataset.from_dict({"number": list(range(len(values)))})
    dataset.set_transform(lambda batch: {"text": [values[n] for n in batch["number"]]})
    return dataset


def row_of(value: Any) -> dict[str, Any]:
    return {"n": 1, "txt": "c"} if value is MISSING else {"n": 1, "text": value}


def json_lines(values: list[Any], folder: Path) -> Any:
    (folder / "a.jsonl").write_text("".join(json.dumps(row_of(value)) + "\n" for value in values))
    return folder / "a.jsonl"


def json_list(values: list[Any], folder: Path) -> Any:
    (folder / "a.json").write_text(json.dumps([row_of(value) for value in values], indent=1))
    return folder / "a.json"


PLACES = {generated: "row {}", by_a_transform: "row {}", json_lines: "a.jsonl, line {}", json_list: "a.json, row {}"}


@pytest.mark.parametrize("streaming", [None, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("source", PLACES, ids=lambda source: source.__name__)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(VALUES | st.just(MISSING), min_size=1, max_size=8))
def test_whatever_a_column_of_text_holds_is_its_documents_or_named(
    values: list[Any], source: Callable[[list[Any], Path], Any], streaming: bool | None
) -> None:
    values = [*["text"] * 12, *values]
    documents = [expected_documents(value) for value in values]
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:

        def opened(on_bad_rows: Any) -> Documents:
            dataset = source(values, Path(folder))
            return open_documents(dataset, streaming=streaming, on_bad_rows=on_bad_rows, notify=said.append)

        skipping = opened("skip")
        found = list(skipping.read())
        assert [chunk.content for chunk in found] == non_empty(documents)
        n_bad = documents.count(None)
        assert skipping.bad_rows.n_skipped == n_bad and len(said) == (n_bad > 0)
        for place in {0, len(found) // 2, len(found) - 1}:  # a run goes on from any document
            again = skipping.read(json.loads(json.dumps(found[place].next_position)))
            assert [chunk.content for chunk in again] == [chunk.content for chunk in found[place + 1 :]]
        assert skipping.bad_rows.n_skipped == n_bad  # rows that are read again are not counted again
        if n_bad == 0:
            assert [chunk.content for chunk in opened("error").read()] == non_empty(documents)
            return
        first = documents.index(None)
        with pytest.raises(BadData) as caught:
            list(opened("error").read())
        where = PLACES[source].format(first + 1)
        problem = f"{where}: column 'text' holds {describe(values[first])}, expected a string or a list of"
        if values[first] is MISSING and source in (json_lines, json_list):
            problem = f"{where}: has no column 'text'; it has: n, txt"
        assert problem in str(caught.value) and problem in said[0]


def ids_in_lines(rows: list[dict[str, Any]], folder: Path) -> Any:
    (folder / "a.jsonl").write_text("".join("\n" + json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def ids_in_parquet(rows: list[dict[str, Any]], folder: Path) -> Any:
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(
    ("source", "place"),
    [(ids_in_lines, lambda n: f"a.jsonl, line {2 * n}"), (ids_in_parquet, lambda n: f"a.parquet, row {n}")],
    ids=["jsonl", "parquet"],
)
@settings(max_examples=20, deadline=None)
@given(
    ids=st.lists(st.lists(st.tuples(st.integers(-2, 12), st.booleans()), min_size=1, max_size=5), min_size=1),
    vocab_size=st.sampled_from([8, 11, None]),
)
def test_id_that_no_token_has_makes_its_row_bad_unless_it_is_masked(
    ids: list[list[tuple[int, bool]]], vocab_size: int | None, source: Any, place: Any, streaming: bool
) -> None:
    ids = [[(1, True), (2, True)], *ids]
    rows = [{"tokens": [i for i, _ in row], "attention_mask": [int(counts) for _, counts in row]} for row in ids]
    kept = [[i for i, counts in row if counts] for row in ids]
    is_bad = [any(i < 0 or vocab_size is not None and i >= vocab_size for i in row) for row in kept]
    with tempfile.TemporaryDirectory() as folder:
        data = source(rows, Path(folder))

        def read(on_bad_rows: Any) -> tuple[list[list[int]], int]:
            documents = open_documents(data, streaming=streaming, on_bad_rows=on_bad_rows, notify=lambda line: None)
            documents = documents.with_vocabulary(vocab_size)
            return [chunk.content for chunk in documents.read()], documents.bad_rows.n_skipped

        good = [row for row, bad in zip(kept, is_bad, strict=True) if row and not bad]
        assert read("skip") == (good, sum(is_bad))
        if any(is_bad):
            with pytest.raises(BadData, match=rf": {place(is_bad.index(True) + 1)}: has.* token id .*on_bad_rows=skip"):
                read("error")


@settings(max_examples=60, deadline=None)
@given(value=VALUES | st.lists(st.integers(0, 9) | st.none() | st.booleans() | st.floats(), max_size=4))
def test_ids_are_flat_lists_of_integers_and_nothing_else(value: Any) -> None:
    is_ids = isinstance(value, list) and all(type(item) is int for item in value)
    if is_ids or value is None:
        assert documents_in(value, "ids") == ([] if value is None else [value])
    else:
        with pytest.raises(WrongValue, match="."):
            documents_in(value, "ids")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (5, r"a number \(5\)"),
        (True, r"a truth value \(True\)"),
        ({"a": 1}, "a dict with the keys 'a'"),
        (["a", 5], "a list of strings and integers"),
        ([["a"]], "a list of lists"),
        (b"a", "bytes"),
        ("a \ud800", r"half a surrogate pair \(character 2\)"),
        (np.array([0.5]), "a list of numbers"),
    ],
    ids=str,
)
def test_message_says_in_words_what_was_found(value: Any, found: str) -> None:
    with pytest.raises(WrongValue, match=f"^{found}"):
        documents_in(value, "text")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("hello", r"a string \('hello'\)"),
        (["hello"], r"a string \('hello'\) as message 1"),
        ([{"role": "user", "content": "hi"}, {"content": "x"}], r"message 2 without a role \(it has 'content'\)"),
        ([{"role": "user", "content": None}], "null as content of message 1"),
        ([{"role": "user", "content": 5}], r"a number \(5\) as content of message 1"),
    ],
    ids=str,
)
def test_conversation_that_is_none_is_named(value: Any, found: str) -> None:
    with pytest.raises(WrongValue, match=f"^{found}"):
        documents_in(value, "chat")


def test_messages_may_be_those_of_sharegpt_or_json_or_hold_nones() -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    filled_in = [message | {"tool_calls": None} for message in conversation]
    for value in (conversation, sharegpt, filled_in, json.dumps(conversation)):
        assert documents_in(value, "chat") == [conversation]
    assert documents_in(None, "chat") == documents_in([], "chat") == []


def test_a_cache_of_hugging_face_that_cannot_be_written_is_said() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/nobody/.cache")
    assert "set HF_HOME to a folder you may write to" in str(Given("dataset_path", "demo").unreadable(error))
