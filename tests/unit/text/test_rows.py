from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import BOS, epoch_of, make_tokenizer, stories, through_a_file

from sae_training.demo_data import DEMO_MODEL
from sae_training.pretokenize import pretokenize
from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents
from sae_training.text.stream import TokenStream

N = 12
EOS = 1  # a separator that the rows hold
TOKENIZER = make_tokenizer(bos_token="<s>")
TEXT = np.random.default_rng(0).integers(2, 200, size=(20, N)).tolist()


def read(dataset: Any, told: list[str], **options: Any) -> TokenStream:
    documents = dataset if hasattr(dataset, "is_tokenized") else open_documents(dataset)
    return TokenStream(documents, TOKENIZER, 5, notify=told.append, **options)


def rows_of(ids: list[list[int]], **columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": ids, **columns})


def with_separators(rows: list[list[int]], separator: int) -> list[list[int]]:
    ids = [separator if i % 17 == 16 else token for i, token in enumerate(joined(rows))]
    return [[ids.pop(0) for _ in row] for row in rows]


def joined(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def without_first(contexts: list[list[int]]) -> list[int]:
    """The text in contexts, each of which begins with BOS."""
    assert all(context[0] == BOS for context in contexts)
    return [token for context in contexts for token in context[1:]]


def packed(text: list[int]) -> list[int]:
    """The ids of contexts of 5, each of which begins with BOS."""
    found: list[int] = []
    for token in text:
        found += [BOS] if len(found) % 5 == 0 and token != BOS else []
        found.append(token)
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("last", [N, 5], ids=["full", "rest"])
def test_packed_rows_are_one_running_text(streaming: bool, last: int) -> None:
    rows = with_separators([*TEXT[:-1], TEXT[-1][:last]], EOS)
    data = rows_of(rows, attention_mask=[[1] * len(row) for row in rows], labels=rows)
    told: list[str] = []
    found = without_first(epoch_of(read(data.to_iterable_dataset() if streaming else data, told)))
    assert found == joined(rows)[: len(found)] and len(found) > 19 * N - 5
    n = 20 if last == N else 19
    assert f"holds packed rows (all {n} sampled have 12 ids, none begins with BOS), which are read as one" in told[1]
    assert "0 of" in told[0] and "sequence_separator_token" in told[1]


def test_separator_that_is_bos_stays_where_the_rows_have_it() -> None:
    told: list[str] = []
    rows = with_separators(TEXT, BOS)
    contexts = epoch_of(read(rows_of(rows), told))
    # A context that begins at a separator has it for its BOS, all others get one.
    text = iter(joined(rows))
    for context in contexts:
        first = next(text)
        expected = [BOS, *([] if first == BOS else [first])]
        expected += [next(text) for _ in range(5 - len(expected))]
        assert context == expected
    assert len(told) == 2 and "read as one running text" in told[0] and told[1].startswith("end of")


@pytest.mark.parametrize(
    "rows",
    [
        [[BOS, *row[1:]] for row in TEXT],
        [row[: 3 + i % 7] for i, row in enumerate(TEXT)],
        [TEXT[0]],
    ],
    ids=["bos", "lengths", "one_row"],
)
def test_documents_are_read_as_such_without_a_word(rows: list[list[int]]) -> None:
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contexts = epoch_of(read(rows_of(rows), told))
    assert [line for line in told if "end of" not in line] == []
    text = [token for row in rows for token in [BOS, *row[row[0] == BOS :]]]
    # BOS stands before every document, and before the rest of one that goes on in the next context.
    assert joined(contexts) == packed(text)[: len(contexts) * 5]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([row if i % 4 else [BOS, *row[1:]] for i, row in enumerate(TEXT)], "25% begin with BOS"),
        ([[*row[: 4 + i % 6], *[7] * (8 - i % 6)] for i, row in enumerate(TEXT)], "seem padded with 7"),
        ([[*[7] * (8 - i % 6), *row[: 4 + i % 6]] for i, row in enumerate(TEXT)], "seem padded with 7"),
        ([row if i % 4 else row[:5] for i, row in enumerate(TEXT)], "75% of 20 sampled have 12 ids"),
    ],
    ids=["some_bos", "padded", "padded_left", "cut_documents"],
)
def test_what_cannot_be_told_names_the_field_that_says_it(rows: list[list[int]], why: str) -> None:
    with pytest.warns(UserWarning, match=f"sequence_separator_token: it cannot be told.*{why}"):
        as_found = read(rows_of(rows), [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_told = read(rows_of(rows), [], separator="bos")
        assert without_first(epoch_of(read(rows_of(rows), [], separator="none")))
    assert epoch_of(as_found) == epoch_of(as_told)


def test_masked_rows_are_documents() -> None:
    told: list[str] = []
    data = rows_of(TEXT, attention_mask=[[1] * (N - i % 3) + [0] * (i % 3) for i in range(20)])
    assert epoch_of(read(data, told))[0][0] == BOS
    assert not any("packed" in line for line in told)


# A row's mask, by what it says of each id; where rows are packed, masked ids are the separators.
SAYS: dict[str, Callable[[list[int], set[int]], list[int]]] = {
    "special_tokens_mask": lambda row, masked: [int(i in masked) for i in range(len(row))],
    "labels": lambda row, masked: [-100 if i in masked else token for i, token in enumerate(row)],
    "attention_mask": lambda row, masked: [int(i not in masked) for i in range(len(row))],
}
MASK = st.sampled_from(list(SAYS))


def with_masked(rows: list[list[int]], masked: list[set[int]], mask: str) -> datasets.Dataset:
    """Rows of ids, and a mask that masks the given places."""
    return rows_of(rows, **{mask: [SAYS[mask](row, places) for row, places in zip(rows, masked, strict=True)]})


def verdict(data: datasets.Dataset, **options: Any) -> tuple[str, list[list[int]]]:
    told: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        stream = read(data, told, **options)
    unclear = any("it cannot be told whether the rows" in str(one.message) for one in warned)
    packed = any("holds packed rows" in line for line in told)
    return "unclear" if unclear else "running text" if packed else "documents", epoch_of(stream)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(mask=MASK, inner=st.lists(st.sets(st.integers(1, N - 2), max_size=4), min_size=20, max_size=20))
def test_ids_masked_within_packed_rows_leave_them_packed(mask: str, inner: list[set[int]]) -> None:
    rows = [
        [EOS if i in masked else token for i, token in enumerate(row)] for row, masked in zip(TEXT, inner, strict=True)
    ]
    found, contexts = verdict(with_masked(rows, inner, mask))
    assert found == "running text"
    text = [token for token in joined(rows) if token != EOS or mask == "special_tokens_mask"]
    assert without_first(contexts) == text[: 4 * len(contexts)] and len(text) - 4 * len(contexts) < 4


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    mask=st.sampled_from(["special_tokens_mask", "labels"]),
    density=st.floats(0.005, 0.15),
    seed=st.integers(0, 99),
)
def test_separators_masked_anywhere_never_make_documents_without_a_word(mask: str, density: float, seed: int) -> None:
    is_masked = np.random.default_rng(seed).random((len(TEXT), N)) < density
    masked = [set(np.flatnonzero(row).tolist()) for row in is_masked]
    n_cut, n_inner = (is_masked[:, 0] | is_masked[:, -1]).sum(), is_masked[:, 1:-1].sum()
    found, _ = verdict(with_masked(TEXT, masked, mask))
    # Where masked ids stand at ends of rows only, they are padding as far as anybody can tell.
    assert found != "documents" or n_inner == 0 and n_cut > 2


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    mask=MASK,
    lengths=st.lists(st.integers(2, N - 3), min_size=3, max_size=20),
    n_full=st.integers(0, 10),
    left=st.booleans(),
    inner=st.booleans(),
)
def test_padded_rows_are_documents_without_a_word(
    mask: str, lengths: list[int], n_full: int, left: bool, inner: bool
) -> None:
    lengths = lengths + [N] * min(n_full, len(lengths))
    rows, masked = [], []
    for row, n in zip(TEXT, lengths, strict=False):
        padding = [0] * (N - n)
        rows.append([*padding, *row[:n]] if left else [*row[:n], *padding])
        masked.append(set(range(N - n)) if left else set(range(n, N)))
        if inner and mask != "attention_mask" and n > 4:
            masked[-1].add(N - 3 if left else 2)
    found, contexts = verdict(with_masked(rows, masked, mask))
    assert found == "documents"
    kept = [[BOS, *(t for i, t in enumerate(row) if i not in there)] for row, there in zip(rows, masked, strict=True)]
    assert joined(contexts) == packed(joined(kept))[: len(contexts) * 5]


def test_padded_last_row_leaves_the_others_packed() -> None:
    says = [[1] * N] * 19 + [[1] * 5 + [0] * (N - 5)]
    found, contexts = verdict(rows_of([*TEXT[:19], TEXT[19][:5] + [0] * (N - 5)], attention_mask=says))
    text = joined([*TEXT[:19], TEXT[19][:5]])
    assert found == "running text" and without_first(contexts) == text[: 4 * len(contexts)]


@pytest.mark.parametrize("options", [{"separator": "none"}, {"prepend_bos": False}, {"separator": "bos"}], ids=str)
def test_special_tokens_mask_takes_the_separators_of_documents_alone(options: dict[str, Any]) -> None:
    rows = [[*row[:5], EOS, *row[6:]] for row in TEXT]
    says = [[int(token == EOS) for token in row] for row in rows]
    found, contexts = verdict(rows_of(rows, special_tokens_mask=says), **options)
    are_documents = options.get("separator") == "bos"
    assert found == ("documents" if are_documents else "running text")
    assert (EOS in joined(contexts)) != are_documents


def test_rows_of_a_mixture_come_in_turn_so_each_is_read_as_a_document() -> None:
    with pytest.warns(UserWarning, match="sequence_separator_token: .*look packed, but come in turn"):
        read(open_mixture([rows_of(TEXT), rows_of([row[:7] for row in TEXT])]), [])


def test_copies_that_pretokenize_wrote_are_documents(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "the cat"}\n' * 30)
    folder = pretokenize(str(DEMO_MODEL), str(tmp_path / "text.jsonl"), tmp_path / "ids", n_processes=1)
    told: list[str] = []
    read(str(folder), told)
    assert told == []


def test_text_is_never_judged() -> None:
    told: list[str] = []
    read(datasets.Dataset.from_dict({"text": ["the cat sat"] * 30 + stories(3)}), told)
    assert told == []


def test_position_in_rows_that_were_read_as_documents_is_refused() -> None:
    stream = read(rows_of(TEXT), [])
    stream.next_contexts(3)
    state = through_a_file(stream.state_dict())
    read(rows_of(TEXT), []).load_state_dict(state)
    del state["running_text"]
    with pytest.raises(ValueError, match="read as documents, with BOS between them, .* one running text now; begin"):
        read(rows_of(TEXT), []).load_state_dict(state)
