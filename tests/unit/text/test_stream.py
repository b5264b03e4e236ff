from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from texts import BOS, documents_of, epoch_of, make_tokenizer, stories, story, stream_of_ids, through_a_file
from transformers import PreTrainedTokenizerFast

from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents
from sae_training.text.stream import TokenStream


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>")


# Contexts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 30, [7, 1, 3, 19], [30]], ids=str)
def test_next_contexts_throws_nothing_away_between_calls(sizes: list[int]):
    ids = [[1 + (i * j) % 90 for j in range(i % 9)] for i in range(40)]
    at_once = stream_of_ids(ids, context_size=5).next_contexts(30)
    stream = stream_of_ids(ids, context_size=5)
    assert torch.equal(torch.cat([stream.next_contexts(n) for n in sizes]), at_once)


def test_contexts_of_text_decode_to_the_text(tokenizer: PreTrainedTokenizerFast):
    texts = [story(60, seed) for seed in range(5)]
    rows = epoch_of(TokenStream(documents_of(texts), tokenizer, 8))
    ids = [token for row in rows for token in row[1:] if token != BOS]
    assert "".join(texts).startswith(str(tokenizer.decode(ids)))
    assert len("".join(texts)) - len(str(tokenizer.decode(ids))) < 60


def test_text_in_chunks_gives_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerFast):
    documents = documents_of([story(900, 1)])
    whole = epoch_of(TokenStream(documents, tokenizer, 16))
    documents.max_chunk_length = 300
    assert len(list(documents.read())) > 10
    assert epoch_of(TokenStream(documents, tokenizer, 16)) == whole


def test_special_tokens_padding_and_truncation_of_the_tokenizer_are_left_out():
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    documents = documents_of([story(40, 0), story(40, 1)])
    rows = epoch_of(TokenStream(documents, tokenizer, 8))
    assert rows == epoch_of(TokenStream(documents, make_tokenizer(bos_token="<s>"), 8))
    assert tokenizer.backend_tokenizer.truncation is not None


# Epochs and held-out contexts -------------------------------------------------------------------


def test_epochs_repeat_the_same_contexts_and_say_so_once():
    said: list[str] = []
    ids = [[1 + (i * j) % 90 for j in range(i % 9)] for i in range(20)]
    stream = stream_of_ids(ids, context_size=5, notify=said.append)
    first = epoch_of(stream)
    n = len(first)
    again = [first[0], *stream.next_contexts(3 * n - 1).tolist()]
    assert again == first * 3
    assert stream.epoch == 3 and stream.context_index == n
    assert len(said) == 1 and f"after {n} contexts of 5 tokens" in said[0]


def test_mixture_ends_where_its_first_part_ends(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    said: list[str] = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(story(40, 1))
    documents = open_mixture([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    TokenStream(documents, tokenizer, 8, notify=said.append).next_contexts(100)
    assert len(said) == 1 and said[0].startswith(f"end of the first of '{tmp_path}/a.txt' and '{tmp_path}/b.txt' after")


def test_held_out_contexts_are_those_of_the_formula():
    stream = stream_of_ids([[i + 1] for i in range(60)], context_size=2, n_held_out=2, held_out_every=5)
    # Context i is [0, i + 1]; of every five the last, for the first two fives.
    assert stream.held_out_contexts().tolist() == [[0, 5], [0, 10]]
    assert stream.next_contexts(10).tolist() == [[0, i] for i in (1, 2, 3, 4, 6, 7, 8, 9, 11, 12)]
    assert stream.context_index == 12


@pytest.mark.parametrize("n_held_out", [0, 1, 3, 100])
def test_train_and_held_out_contexts_are_disjoint_and_complete(n_held_out: int):
    ids = [[100 * i + j for j in range(1, i % 9 + 2)] for i in range(1, 40)]
    all_rows = epoch_of(stream_of_ids(ids, context_size=5))
    stream = stream_of_ids(ids, context_size=5, n_held_out=n_held_out, held_out_every=4)
    held_out = stream.held_out_contexts().tolist()
    assert len(held_out) == min(n_held_out, len(all_rows) // 4)
    train = epoch_of(stream)
    assert sorted(train + held_out) == sorted(all_rows)
    two_more = [train[0], *stream.next_contexts(2 * len(train) - 1).tolist()]
    assert stream.epoch == 2 and two_more == train * 2
    assert stream.held_out_contexts().tolist() == held_out


def test_held_out_and_first_contexts_leave_the_stream_where_it_is():
    ids = [[1 + (i * j) % 90 for j in range(i % 9)] for i in range(40)]
    undisturbed = stream_of_ids(ids, context_size=5, n_held_out=3, held_out_every=4)
    expected = undisturbed.next_contexts(50)
    stream = stream_of_ids(ids, context_size=5, n_held_out=3, held_out_every=4)
    parts = []
    for _ in range(10):
        stream.held_out_contexts()
        stream.first_contexts(7)
        parts.append(stream.next_contexts(5))
    assert torch.equal(torch.cat(parts), expected)


def test_first_contexts_are_fewer_where_the_data_ends():
    stream = stream_of_ids([[1, 2, 3], [4, 5, 6]], context_size=4, n_held_out=1, held_out_every=2)
    assert stream.first_contexts(1).tolist() == [[0, 1, 2, 3]]
    assert stream.first_contexts(9).tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]


def test_held_out_of_too_little_data_names_eval_dataset_path():
    stream = stream_of_ids([[1, 2, 3], [4, 5, 6]], context_size=4, n_held_out=1)
    with pytest.raises(ValueError, match="only 2 contexts of 4 tokens.*eval_dataset_path"):
        stream.held_out_contexts()


# Resuming ---------------------------------------------------------------------------------------


def sources(folder: Path) -> dict[str, Callable[[], Any]]:
    """Name -> a function that opens the same data afresh, as a new process would."""
    texts = stories()
    rows = [{"text": text} for text in texts]

    def dataset() -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})

    def generated() -> Iterator[dict[str, str]]:
        yield from rows

    def tokenized() -> datasets.Dataset:
        return datasets.Dataset.from_dict({"input_ids": [[ord(letter) for letter in text] for text in texts]})

    (folder / "parts").mkdir()
    for part in range(3):
        lines = [json.dumps(row) + "\n" for row in rows[part * 8 : part * 8 + 8]]
        (folder / "parts" / f"{part}.jsonl").write_text("".join(lines))
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:02}.txt").write_text(text)
    dataset().to_parquet(folder / "rows.parquet", batch_size=5)
    dataset().save_to_disk(folder / "saved")
    iterable = datasets.IterableDataset
    return {
        "map": dataset,
        "map_shuffled": lambda: dataset().shuffle(seed=3),
        "map_tokenized": tokenized,
        "jsonl_folder": lambda: open_documents(folder / "parts"),
        "txt_folder": lambda: open_documents(folder / "texts"),
        "save_to_disk": lambda: open_documents(str(folder / "saved")),
        "stream_jsonl_folder": lambda: open_documents(folder / "parts", streaming=True),
        "stream_txt_folder": lambda: open_documents(folder / "texts", streaming=True),
        "stream_parquet": lambda: open_documents(folder / "rows.parquet", streaming=True),
        "stream_save_to_disk": lambda: open_documents(folder / "saved", streaming=True),
        "stream_shards": lambda: dataset().to_iterable_dataset(num_shards=4),
        "stream_tokenized": lambda: tokenized().to_iterable_dataset(num_shards=2),
        "stream_generator": lambda: iterable.from_generator(generated),
        "stream_map_filter": lambda: (
            dataset()
            .to_iterable_dataset(num_shards=2)
            .map(lambda row: {"text": row["text"] + " end"})
            .filter(lambda row: row["number"] % 3 != 1)
        ),
        "stream_batched_map": lambda: (
            dataset()
            .to_iterable_dataset(num_shards=2)
            .map(lambda rows: {"text": [t[::-1] for t in rows["text"]]}, batched=True, batch_size=4)
        ),
        "stream_skip_take": lambda: iterable.from_generator(generated).skip(2).take(15),
        "stream_shuffled": lambda: dataset().to_iterable_dataset(num_shards=4).shuffle(seed=5, buffer_size=6),
        "stream_interleaved": lambda: datasets.interleave_datasets(
            [dataset().to_iterable_dataset(), iterable.from_generator(generated)],
            probabilities=[0.3, 0.7],
            seed=1,
        ),
        "mixture": lambda: open_mixture([folder / "parts", dataset()], (3, 1)),
        "stream_mixture": lambda: open_mixture([folder / "parts", folder / "texts"], (3, 1), streaming=True),
        "stream_mixture_tokenized": lambda: open_mixture(
            [tokenized().select(range(9)), datasets.Dataset.from_dict({"tokens": [[i] * 30 for i in range(9)]})],
            streaming=True,
        ),
        "stream_mixture_shuffled": lambda: open_mixture(
            [dataset().select(range(12)), dataset().to_iterable_dataset().shuffle(seed=5, buffer_size=6)]
        ),
    }


SOURCE_NAMES = [
    "map",
    "map_shuffled",
    "map_tokenized",
    "jsonl_folder",
    "txt_folder",
    "save_to_disk",
    "stream_jsonl_folder",
    "stream_txt_folder",
    "stream_parquet",
    "stream_save_to_disk",
    "stream_shards",
    "stream_tokenized",
    "stream_generator",
    "stream_map_filter",
    "stream_batched_map",
    "stream_skip_take",
    "stream_shuffled",
    "stream_interleaved",
    "mixture",
    "stream_mixture",
    "stream_mixture_tokenized",
    "stream_mixture_shuffled",
]


@pytest.mark.parametrize("name", SOURCE_NAMES)
def test_resume_at_every_position_goes_on_exactly(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str):
    make = sources(tmp_path)[name]

    def new_stream() -> TokenStream:
        made = make()
        documents = made if hasattr(made, "read") else open_documents(made)
        documents.max_chunk_length = 100
        return TokenStream(
            documents, tokenizer, 16, n_held_out=2, held_out_every=5, batch_characters=90, batch_tokens=12
        )

    stream = new_stream()
    states, rows, places = [], [], []
    while stream.epoch < 2 or stream.context_index < 13:
        states.append(through_a_file(stream.state_dict()))
        places.append((stream.epoch, stream.context_index))
        rows.append(stream.next_contexts(1))
    assert len(states) > 40
    resumed = new_stream()
    for at, state in enumerate(states[:-12]):
        resumed.load_state_dict(state)
        expected = torch.cat(rows[at : at + 12])
        assert torch.equal(resumed.next_contexts(len(expected)), expected), f"from position {at}"
        assert (resumed.epoch, resumed.context_index) == places[at + len(expected)]


def test_state_saved_before_the_first_call_is_the_beginning(tokenizer: PreTrainedTokenizerFast):
    documents = documents_of(stories())
    stream = TokenStream(documents, tokenizer, 16)
    state = stream.state_dict()
    expected = stream.next_contexts(5)
    stream.load_state_dict(state)
    assert state["epoch"] == 0 and state["context_index"] == 0 and len(state["pending"]) == 0
    assert torch.equal(stream.next_contexts(5), expected)


def test_resuming_a_map_style_source_reads_only_what_follows(tokenizer: PreTrainedTokenizerFast):
    read: list[int] = []
    dataset = datasets.Dataset.from_dict({"text": stories(), "number": list(range(23))})
    dataset.set_transform(lambda rows: read.extend(rows["number"]) or {"text": rows["text"]})
    stream = TokenStream(open_documents(dataset), tokenizer, 16, batch_characters=90)
    stream.next_contexts(12)
    state = stream.state_dict()
    assert state["source"]["row"] > 5
    resumed = TokenStream(open_documents(dataset), tokenizer, 16, batch_characters=90)
    stream.next_contexts(1)
    time.sleep(0.2)
    read.clear()
    resumed.load_state_dict(state)
    resumed.next_contexts(3)
    assert min(read) >= state["source"]["row"]


@pytest.mark.parametrize(
    "other",
    [
        {"text": ["some words"] * 4, "streamed": True},
        {"text": ["some words"] * 5},
        {"tokens": [[1, 2, 3]] * 4},
        {"content": ["some words"] * 4},
    ],
    ids=["streamed", "other_length", "tokenized", "other_column"],
)
def test_state_of_another_kind_of_source_is_refused(tokenizer: PreTrainedTokenizerFast, other: dict[str, Any]):
    state = TokenStream(documents_of(["some words"] * 4), tokenizer, 8).state_dict()
    streaming = other.pop("streamed", False)
    documents = open_documents(datasets.Dataset.from_dict(other), streaming=streaming)
    with pytest.raises(ValueError, match="the saved position is of a source with"):
        TokenStream(documents, tokenizer, 8).load_state_dict(state)


# Errors -----------------------------------------------------------------------------------------


def test_data_shorter_than_a_context_is_an_error_with_both_numbers():
    stream = stream_of_ids([[1, 2], [3, 4, 5]], context_size=8)
    with pytest.raises(ValueError, match="holds 7 tokens in all, but one.*context_size=8"):
        stream.next_contexts(1)


def test_documents_that_are_all_empty_are_an_error(tokenizer: PreTrainedTokenizerFast):
    documents = documents_of(["", ""])
    with pytest.raises(ValueError, match="holds 0 tokens in all"):
        TokenStream(documents, tokenizer, 8).next_contexts(1)


def test_token_id_beyond_the_vocabulary_is_an_error_with_both_numbers():
    stream = stream_of_ids([[1, 2], [3, 77, 5]], context_size=4, vocab_size=77)
    with pytest.raises(ValueError, match=r"token id 77, but the model's vocabulary has 77 ids"):
        stream.next_contexts(1)
    with pytest.raises(ValueError, match=r"row 2: has, in column 'tokens', token id 77"):
        stream.first_contexts(1)
    stream_of_ids([[1, 2], [3, 77, 5]], context_size=4, vocab_size=78).next_contexts(1)


def test_bos_beyond_the_vocabulary_is_an_error():
    tokenizer = make_tokenizer(bos_token="<extra>")
    documents = documents_of(["the cat"])
    n_ids = len(tokenizer)
    with pytest.raises(ValueError, match=f"for BOS, token id {n_ids - 1}"):
        TokenStream(documents, tokenizer, 4, vocab_size=n_ids - 1)


def test_negative_token_ids_are_an_error():
    stream = stream_of_ids([[1, -100, 2]], context_size=4, vocab_size=77)
    with pytest.raises(ValueError, match="token id -100 in column 'tokens'"):
        stream.next_contexts(1)


@pytest.mark.parametrize(("context_size", "bos"), [(1, True), (0, False)])
def test_context_without_room_for_a_token_is_an_error(context_size: int, bos: bool):
    with pytest.raises(ValueError, match="context_size: found"):
        stream_of_ids([[1, 2]], context_size=context_size, bos=bos)


def test_errors_name_the_field_that_holds_the_data_set(tokenizer: PreTrainedTokenizerFast):
    data = datasets.Dataset.from_dict({"tokens": [[1, 77]]})
    documents = open_documents(data, field="eval_dataset_path")
    with pytest.raises(ValueError, match="^eval_dataset_path: .* has, in column 'tokens', token id 77"):
        TokenStream(documents, tokenizer, 4, vocab_size=77).first_contexts(1)
    with pytest.raises(ValueError, match="^eval_dataset_path: .* holds 3 tokens in all"):
        TokenStream(documents, tokenizer, 4).first_contexts(1)


def test_text_without_a_tokenizer_is_an_error():
    documents = documents_of(["the cat"])
    with pytest.raises(ValueError, match="tokenizer: found None"):
        TokenStream(documents, None, 4, prepend_bos=False)


def test_stream_prints_nothing(tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]):
    documents = documents_of(stories())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TokenStream(documents, tokenizer, 16).next_contexts(300)
    assert capfd.readouterr() == ("", "")
