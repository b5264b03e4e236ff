from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from texts import BOS, epoch_of, make_tokenizer, stream_of_ids, through_a_file

from sae_training.text.open import open_documents
from sae_training.text.packing import pack
from sae_training.text.stream import TokenStream


def test_packing_puts_one_bos_at_documents_and_context_starts():
    # Stream: 0 1 2 3 0 4 5 0 6 7 8 9. Row 1 takes 0 1 2 3. Row 2 takes 0 4 5 0 (a document start).
    # Row 3 starts within the last document: 0 in front of 6 7 8. The tail, 9, is dropped.
    stream = stream_of_ids([[1, 2, 3], [4, 5], [6, 7, 8, 9]], context_size=4)
    assert epoch_of(stream) == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 6, 7, 8]]


def test_packing_of_a_document_that_ends_with_the_row_gives_no_second_bos():
    stream = stream_of_ids([[1, 2, 3], [4, 5, 6], [7, 8, 9]], context_size=4)
    assert epoch_of(stream) == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]


def test_packing_keeps_the_bos_that_documents_bring():
    stream = stream_of_ids([[0, 1, 2, 3], [0, 4, 5, 6, 7, 8, 9]], context_size=4)
    assert epoch_of(stream) == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]


def test_packing_shortens_runs_of_bos_to_one():
    # As where <|endoftext|> closes a document and is the BOS of the next.
    stream = stream_of_ids([[0, 0, 1, 2, 0], [0, 3, 4, 0], [5, 6]], context_size=5)
    # Stream: 0 1 2 0 3 4 0 5 6
    assert epoch_of(stream) == [[0, 1, 2, 0, 3], [0, 4, 0, 5, 6]]


def test_packing_of_a_long_document_uses_every_token():
    stream = stream_of_ids([list(range(1, 21))], context_size=6)
    rows = epoch_of(stream)
    assert [row[0] for row in rows] == [0, 0, 0, 0]
    assert [token for row in rows for token in row[1:]] == list(range(1, 21))


def test_packing_without_bos_puts_documents_one_after_the_other():
    stream = stream_of_ids([[1, 2, 3], [4, 5], [6, 7, 8, 9]], context_size=4, bos=False)
    assert epoch_of(stream) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_packing_skips_empty_documents():
    stream = stream_of_ids([[], [1, 2, 3], [], [4, 5, 6], []], context_size=4)
    assert epoch_of(stream) == [[0, 1, 2, 3], [0, 4, 5, 6]]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_pack_returns_how_many_ids_it_used(limit: int):
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 0, 6]).numpy()
    rows, n_used = pack(tokens, 4, BOS, limit)
    expected = [[0, 1, 2, 3], [0, 4, 5, 0]][:limit]
    assert rows.tolist() == expected
    assert n_used == (4 if limit == 1 else 7)


def test_eos_serves_as_bos_where_there_is_no_bos():
    documents = open_documents(datasets.Dataset.from_dict({"tokens": [[1, 2, 3]]}))
    stream = TokenStream(documents, make_tokenizer(eos_token="<s>"), 4)
    assert stream.next_contexts(1).tolist() == [[0, 1, 2, 3]]


def test_tokenizer_without_bos_and_eos_packs_without_and_warns_once():
    documents = open_documents(datasets.Dataset.from_dict({"tokens": [[1, 2, 3], [4, 5, 6]]}))
    with pytest.warns(UserWarning, match="neither a BOS nor an EOS") as caught:
        stream = TokenStream(documents, make_tokenizer(), 3)
        assert stream.next_contexts(2).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert len(caught) == 1


# Separators -------------------------------------------------------------------------------------

SEPARATOR = 9


def test_separator_stands_between_documents_and_not_before_the_first():
    # Stream: 1 2 3 9 4 5 9 6 7 8. The tail, 7 8, is dropped; the second epoch begins as the first.
    stream = stream_of_ids([[1, 2, 3], [], [4, 5], [6, 7, 8]], context_size=4, bos=False, separator=SEPARATOR)
    assert stream.next_contexts(4).tolist() == [[1, 2, 3, 9], [4, 5, 9, 6]] * 2


def test_with_a_separator_bos_starts_only_contexts():
    stream = stream_of_ids([[1, 2, 3], [4, 5], [6, 7, 8]], context_size=4, separator=SEPARATOR)
    assert epoch_of(stream) == [[0, 1, 2, 3], [0, 9, 4, 5], [0, 9, 6, 7]]


def test_separator_that_a_document_brings_is_not_doubled():
    # Between 1 and 2 both bring it, before 3 none does, 3 and 4 have a document between them that is nothing else.
    documents = [[1, 9], [9, 2], [3], [9], [9, 4]]
    assert epoch_of(stream_of_ids(documents, 7, bos=False, separator=SEPARATOR)) == [[1, 9, 2, 9, 3, 9, 4]]


def test_separators_within_documents_are_kept():
    documents = [[9, 9, 1, 9, 9, 2], [3, 9, 9, 4]]
    rows = epoch_of(stream_of_ids(documents, 11, bos=False, separator=SEPARATOR))
    assert rows == [[9, 9, 1, 9, 9, 2, 9, 3, 9, 9, 4]]


def test_bos_as_separator_needs_no_bos_at_context_starts():
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert epoch_of(stream_of_ids(documents, 4, bos=False, separator="bos")) == [[1, 2, 3, 0], [4, 5, 0, 6]]
    assert epoch_of(stream_of_ids(documents, 4, separator="bos")) == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 6, 7, 8]]


def test_no_separator_leaves_bos_at_context_starts():
    rows = epoch_of(stream_of_ids([[1, 2, 3], [4, 5], [6, 7, 8, 9]], context_size=4, separator="none"))
    assert rows == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]


@pytest.mark.parametrize("name", ["eos", "sep"])
def test_separator_named_eos_or_sep_is_that_token_of_the_tokenizer(name: str):
    tokenizer = make_tokenizer(**{f"{name}_token": "<extra>"})
    documents = open_documents(datasets.Dataset.from_dict({"tokens": [[1], [2]]}))
    stream = TokenStream(documents, tokenizer, 3, prepend_bos=False, separator=name)
    assert stream.next_contexts(1).tolist() == [[1, len(tokenizer) - 1, 2]]


@pytest.mark.parametrize(
    ("separator", "message"),
    [
        ("eos", "sequence_separator_token: found 'eos', but the tokenizer has no EOS token; choose another"),
        (77, "sequence_separator_token: found 77, expected an id of the model's vocabulary, 0 to 76; choose"),
        ("sep", f"sequence_separator_token: found 'sep', which the tokenizer says is {len(make_tokenizer())}, exp"),
    ],
    ids=str,
)
def test_separator_that_is_no_token_of_the_model_is_an_error(separator: Any, message: str):
    documents = open_documents(datasets.Dataset.from_dict({"tokens": [[1], [2]]}))
    with pytest.raises(ValueError, match=f"^{message}"):
        TokenStream(documents, make_tokenizer(sep_token="<extra>"), 3, False, vocab_size=77, separator=separator)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("separator", ["bos", "none", SEPARATOR])
def test_resume_with_a_separator_goes_on_exactly(bos: bool, separator: Any):
    # Documents that end or begin with the separator, batches and contexts that end where they do.
    ids = [[i + 10, *[20] * (i % 3), *[SEPARATOR] * (i % 2)] if i % 5 else [SEPARATOR, 30] for i in range(60)]
    whole = epoch_of(stream_of_ids(ids, 3, bos, separator=separator, batch_tokens=1000))
    stream = stream_of_ids(ids, 3, bos, separator=separator, batch_tokens=4)
    states = []
    for row in whole:
        states.append(through_a_file(stream.state_dict()))
        assert stream.next_contexts(1).tolist() == [row]
    assert any(len(state["pending"]) == 0 for state in states[1:])
    for at, state in enumerate(states):
        stream.load_state_dict(state)
        assert stream.next_contexts(len(whole) - at).tolist() == whole[at:], f"from position {at}"
