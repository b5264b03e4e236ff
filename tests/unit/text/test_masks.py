from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import BOS, epoch_of, make_tokenizer, through_a_file

from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents
from sae_training.text.packing import PADDING
from sae_training.text.stream import TokenStream

TOKENIZER = make_tokenizer(bos_token="<s>")

# ------------------------------------------------------------------------------------------- rows that a user may write

# An id, and what each mask says of it: does it count?
IDS = st.tuples(st.integers(0, 9), st.booleans(), st.booleans(), st.booleans())
ROWS = st.lists(st.lists(IDS, max_size=9), min_size=1, max_size=8)
# The kind of number, or no such column. A column may also be missing in some rows.
MASKS = st.fixed_dictionaries(
    {
        "attention_mask": st.sampled_from([None, "int64", "int8", "bool", "float32"]),
        "special_tokens_mask": st.sampled_from([None, "int64", "bool"]),
        "labels": st.sampled_from([None, "int64", "int32"]),
    }
)


def as_is(dataset: datasets.Dataset) -> Any:
    return dataset


def made_by_a_transform(dataset: datasets.Dataset) -> Any:
    numbers = datasets.Dataset.from_dict({"n": list(range(len(dataset)))})

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [dataset[n] for n in batch["n"]]
        return {
            name: [None if row[name] is None else torch.tensor(row[name]) for row in found]
            for name in dataset.column_names
        }

    return numbers.with_transform(rows)


WAYS: list[Callable[[datasets.Dataset], Any]] = [
    as_is,
    lambda dataset: dataset.with_format("torch"),
    lambda dataset: dataset.with_format("numpy"),
    lambda dataset: dataset.to_iterable_dataset(),
    lambda dataset: dataset.to_iterable_dataset().with_format("numpy"),
    lambda dataset: dataset.to_iterable_dataset().map(lambda row: row),
    lambda dataset: datasets.IterableDataset.from_generator(lambda: iter(dataset)),
    lambda dataset: datasets.DatasetDict(train=dataset),
    made_by_a_transform,
]


def dataset_of(rows: Any, masks: dict[str, str | None], column: str, without: int | None) -> datasets.Dataset:
    """Row number `without` has no attention_mask."""
    columns: dict[str, list[Any]] = {column: [[token for token, *_ in row] for row in rows]}
    features = {column: datasets.List(datasets.Value("int64"))}
    for name, kind in masks.items():
        if kind is None:
            continue
        features[name] = datasets.List(datasets.Value(kind))
        if name == "labels":
            columns[name] = [[token if counts else -100 for token, _, _, counts in row] for row in rows]
        elif name == "attention_mask":
            values = [[int(counts) for _, counts, _, _ in row] for row in rows]
            columns[name] = [None if i == without else row for i, row in enumerate(values)]
        else:
            columns[name] = [[int(not counts) for _, _, counts, _ in row] for row in rows]
    return datasets.Dataset.from_dict(columns).cast(datasets.Features(features))


# ------------------------------------------------------------------------------------------------------------- the rule


def ids_that_count(rows: Any, masks: dict[str, str | None], without: int | None) -> list[list[int]]:
    """An id counts unless one of the masks that there are says no."""
    counting = []
    for i, row in enumerate(rows):
        kept = []
        for token, attended, ordinary, labelled in row:
            masked = masks["attention_mask"] is not None and i != without and not attended
            masked = masked or masks["special_tokens_mask"] is not None and not ordinary
            masked = masked or masks["labels"] is not None and not labelled
            if not masked:
                kept.append(token)
        counting.append(kept)
    return counting


def one_sequence_per_context(sequences: list[list[int]], context_size: int, bos: bool) -> list[list[int]]:
    contexts = []
    for sequence in sequences:
        left, is_first = list(sequence), True
        while left:
            context = [BOS] if bos else []
            while bos and left[:1] == [BOS]:  # those of the sequence: all at its start, where it goes on that in front
                left.pop(0)
                if not is_first:
                    break
            while left and len(context) < context_size:
                context.append(left.pop(0))
            if context != [BOS] or not bos:
                contexts.append(context + [PADDING] * (context_size - len(context)))
            is_first = False
    return contexts


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    rows=ROWS,
    masks=MASKS,
    column=st.sampled_from(["tokens", "input_ids"]),
    way=st.sampled_from(WAYS),
    without=st.one_of(st.none(), st.integers(0, 7)),
    bos=st.booleans(),
    packs=st.booleans(),
    stop=st.integers(0, 5),
)
def test_only_ids_that_count_are_read(
    rows: Any, masks: Any, column: str, way: Any, without: int | None, bos: bool, packs: bool, stop: int
) -> None:
    sequences = ids_that_count(rows, masks, without)
    bos = bos and not packs  # contexts of joined documents with BOS: test_packing
    if packs:
        joined = [token for sequence in sequences for token in sequence]
        expected = [joined[i : i + 4] for i in range(0, len(joined) - 3, 4)]
    else:
        expected = one_sequence_per_context(sequences, 4, bos)
    data = way(dataset_of(rows, masks, column, without))

    def stream() -> TokenStream:
        documents = open_documents(data, text_column=column)
        documents.are_whole = True  # rows that look packed: test_rows
        return TokenStream(
            documents, TOKENIZER, 4, prepend_bos=bos, pack_sequences=packs, batch_tokens=5, notify=lambda line: None
        )

    if not expected:
        with pytest.raises(ValueError, match="holds"):
            stream().next_contexts(1)
        return
    assert epoch_of(stream()) == expected
    begun = stream()
    begun.next_contexts(min(stop, len(expected)))
    state, resumed = through_a_file(begun.state_dict()), stream()
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next_contexts(3), begun.next_contexts(3))


# -------------------------------------------------------------------------------------------------------------- by hand

PADDED = {
    "input_ids": [[0, 0, 5, 6], [7, 0, 8, 9], [4, 3, 0, 0]],
    "attention_mask": [[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]],
}
COUNTING = [[5, 6], [7, 8, 9], [4, 3]]


def contents(documents: Any) -> list[list[int]]:
    return [list(chunk.content) for chunk in documents.read()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_masks_in_files_are_read(tmp_path: Path, suffix: str, streaming: bool) -> None:
    dataset = datasets.Dataset.from_dict(PADDED)
    path = tmp_path / f"rows.{suffix}"
    dataset.to_parquet(path) if suffix == "parquet" else dataset.to_json(path)
    assert contents(open_documents(path, streaming=streaming)) == COUNTING


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_a_mixture_keep_their_own_masks(streaming: bool) -> None:
    plain = {"tokens": [[11, 12], [13], [14, 15, 16]]}
    parts = [datasets.Dataset.from_dict(PADDED), datasets.Dataset.from_dict(plain)]
    found = contents(open_mixture([part.to_iterable_dataset() if streaming else part for part in parts]))
    assert [row for row in found if row[0] < 10] == COUNTING[: len([row for row in found if row[0] < 10])]
    assert [row for row in found if row[0] > 10] == plain["tokens"][: len([row for row in found if row[0] > 10])]


def test_one_line_says_what_was_dropped() -> None:
    told: list[str] = []
    TokenStream(open_documents(datasets.Dataset.from_dict(PADDED)), TOKENIZER, 4, notify=told.append)
    assert told == [
        "dataset_path: the Dataset passed in: ids masked by attention_mask are dropped: 5 of 12 (42%) in 3 rows sampled"
    ]


@pytest.mark.parametrize("labels", [[1, 0, 2], [[1], [0], [2]], ["a", "b", "c"], [[1, 0], [0, 1], [1, 1]]])
def test_labels_of_another_kind_mask_nothing(labels: list[Any]) -> None:
    data = {"input_ids": [[5, 6, 7], [8, 9, 1], [2, 3, 4]], "labels": labels}
    assert contents(open_documents(datasets.Dataset.from_dict(data))) == data["input_ids"]


@pytest.mark.parametrize("streaming", [False, True])
def test_mask_that_does_not_fit_names_the_row(streaming: bool) -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7, 8, 9]], "attention_mask": [[1, 1], [1, 1]]})
    documents = open_documents(data.to_iterable_dataset() if streaming else data)
    with pytest.raises(ValueError, match=r"dataset_path: .*: row 2: attention_mask: found 2 values for 3 ids .*remove"):
        contents(documents)


@pytest.mark.parametrize("name", ["loss_mask", "completion_mask", "assistant_masks", "counts"])
@pytest.mark.parametrize("way", ["object", "stream", "generator", "transform", "jsonl", "parquet"])
def test_mask_of_another_name_is_warned_of(way: str, name: str, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict(
        {"input_ids": PADDED["input_ids"], name: PADDED["attention_mask"], "token_type_ids": PADDED["attention_mask"]}
    )
    data: Any = dataset
    if way in ("stream", "generator"):
        data = WAYS[3 if way == "stream" else 6](dataset)
    if way == "transform":
        data = made_by_a_transform(dataset)
    if way in ("jsonl", "parquet"):
        data = tmp_path / f"a.{way}"
        dataset.to_parquet(data) if way == "parquet" else dataset.to_json(data)
    with pytest.warns(UserWarning, match=f"dataset_path: .* in column '{name}', which is not read.* name it attention"):
        assert contents(open_documents(data)) == PADDED["input_ids"]


@pytest.mark.parametrize("values", [[[5, 0, 1, 1]] * 3, [[0, 1]] * 3, [0, 1, 1], ["a", "b", "c"], [None] * 3])
def test_columns_that_are_no_masks_are_left_alone(values: list[Any]) -> None:
    data = {"input_ids": PADDED["input_ids"], "position_ids": values, "token_type_ids": PADDED["attention_mask"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_documents(datasets.Dataset.from_dict(data))


@pytest.mark.parametrize("packs", [True, False])
def test_data_of_which_all_ids_are_masked_says_so(packs: bool) -> None:
    data = datasets.Dataset.from_dict({"input_ids": PADDED["input_ids"], "labels": [[-100] * 4] * 3})
    stream = TokenStream(open_documents(data), TOKENIZER, 4, pack_sequences=packs, notify=lambda line: None)
    with pytest.raises(ValueError, match="all 12 ids in 3 rows are masked by labels; correct the column, or remove"):
        stream.next_contexts(1)


def test_columns_beside_text_are_no_masks() -> None:
    data = {"text": ["the cat", "a dog"], "attention_mask": [[0, 1], [1]]}
    assert open_documents(datasets.Dataset.from_dict(data)).masks == ()


def test_position_that_was_saved_with_the_masked_ids_is_refused() -> None:
    raw = open_documents(datasets.Dataset.from_dict({"input_ids": PADDED["input_ids"]}))
    with pytest.raises(ValueError, match="masks None, but .* remove the columns"):
        open_documents(datasets.Dataset.from_dict(PADDED)).check_position(json.loads(json.dumps(raw.start())))


def test_sequences_longer_than_a_chunk_and_a_batch_stay_together() -> None:
    rows = [list(range(1, 30)), [40], list(range(50, 61))]
    documents = open_documents(datasets.Dataset.from_dict({"tokens": rows}))
    documents.max_chunk_length = 6
    stream = TokenStream(documents, TOKENIZER, 5, pack_sequences=False, batch_tokens=4)
    found = np.array(epoch_of(stream))
    assert found.tolist() == one_sequence_per_context(rows, 5, bos=True)
    assert [len(found), (found == PADDING).sum()] == [8 + 1 + 3, 3 + 3 + 1]
