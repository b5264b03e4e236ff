"""Tokenising ahead of need: the same contexts, errors in their place, and threads that end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from texts import documents_of, make_tokenizer, stories, story
from transformers import PreTrainedTokenizerFast

from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents
from sae_training.text.stream import TokenStream

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>")


class Letters:
    """A tokenizer that is all Python, and fails on capitals."""

    bos_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        if any(text != text.lower() for text in texts):
            raise OverflowError("a capital")
        return {"input_ids": [[1 + ord(letter) % 50 for letter in text] for text in texts]}


def test_tokenizer_without_rust_gives_its_own_ids() -> None:
    text = story(60, 0)
    ids = [1 + ord(letter) % 50 for letter in text]
    contexts = TokenStream(documents_of([text]), Letters(), 16).next_contexts(10)
    assert contexts[:, 0].eq(0).all()
    assert contexts[:, 1:].flatten().tolist() == ids[:150]


def test_error_in_the_thread_reaches_the_caller_and_leaves_the_stream_usable(tokenizer: PreTrainedTokenizerFast):
    broken = True

    def rows() -> Iterator[dict[str, str]]:
        for number, text in enumerate(stories()):
            if number == 9 and broken:
                raise ConnectionError("the cable is out")
            yield {"text": text}

    dataset = datasets.IterableDataset.from_generator(rows)
    stream = TokenStream(open_documents(dataset), tokenizer, 16, batch_characters=90)
    stream.next_contexts(2)
    with pytest.raises(ConnectionError, match="the cable is out"):
        stream.next_contexts(40)
    broken = False
    expected = TokenStream(documents_of(stories()), tokenizer, 16, batch_characters=90).next_contexts(12)[2:]
    assert torch.equal(stream.next_contexts(10), expected)


def test_error_while_reading_comes_after_all_that_was_read_before(tokenizer: PreTrainedTokenizerFast) -> None:
    def rows() -> Iterator[dict[str, str]]:
        for number in range(60):
            if number == 40:
                raise ConnectionError("the cable is out")
            yield {"text": story(60, number)}

    broken = open_documents(datasets.IterableDataset.from_generator(rows))
    stream = TokenStream(broken, tokenizer, 16, batch_characters=200)  # a document or two to a batch
    contexts = []
    with pytest.raises(ConnectionError, match="the cable is out"):
        for _ in range(10_000):
            contexts.append(stream.next_contexts(1))
    before = documents_of([story(60, number) for number in range(40)])
    expected = TokenStream(before, tokenizer, 16).next_contexts(len(contexts))
    assert torch.equal(torch.cat(contexts), expected)
    assert len(contexts) == stream.context_index > 100 and stream.state_dict()["source"]["row"] == 40


def test_error_of_the_tokenizer_reaches_the_caller_unchanged() -> None:
    texts = [story(60, i) for i in range(60)]
    texts[30] = "Capital"
    stream = TokenStream(documents_of(texts), Letters(), 16, batch_characters=200)
    with pytest.raises(OverflowError, match="a capital") as caught:
        stream.next_contexts(2000)
    assert caught.value.__cause__ is None


def test_tokenizer_can_be_used_and_changed_while_the_thread_works() -> None:
    tokenizer, untouched = make_tokenizer(bos_token="<s>"), make_tokenizer(bos_token="<s>")
    documents = documents_of([story(3000, i) for i in range(200)])
    stream = TokenStream(documents, tokenizer, 64, batch_characters=100_000)
    tokenizer.pad_token = "<s>"
    contexts = []
    for length in range(5, 60):
        contexts.append(stream.next_contexts(40))
        tokenizer(["the cat", "a dog"], padding="max_length", max_length=length, truncation=True)
    assert tokenizer.backend_tokenizer.truncation is not None and tokenizer.backend_tokenizer.padding is not None
    assert torch.equal(torch.cat(contexts), TokenStream(documents, untouched, 64).next_contexts(55 * 40))


# The end ----------------------------------------------------------------------------------------


def test_threads_end_by_themselves(tokenizer: PreTrainedTokenizerFast):
    documents = documents_of(stories())
    stream = TokenStream(documents, tokenizer, 16)
    stream.next_contexts(3)
    deadline = time.time() + 10
    while any(thread.name == "tokens-ahead" for thread in threading.enumerate()):
        assert time.time() < deadline
        time.sleep(0.01)


def test_program_ends_at_once_and_silently_while_a_batch_is_under_way(tmp_path: Path):
    make_tokenizer(bos_token="<s>").save_pretrained(tmp_path / "tokenizer")
    program = f"""
import time
import datasets
from transformers import PreTrainedTokenizerFast
from sae_training.text.open import open_documents
from sae_training.text.stream import TokenStream
tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r})
rows = datasets.Dataset.from_dict({{"text": ["the cat sat on the mat " * 1000] * 200}})
stream = TokenStream(open_documents(rows.to_iterable_dataset()), tokenizer, 64)
print(tuple(stream.next_contexts(2).shape))
print(time.time(), flush=True)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}  # as users do
    command = [sys.executable, "-W", "error", "-c", program]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    shape, at = ended.stdout.splitlines()
    assert (ended.returncode, shape, ended.stderr) == (0, "(2, 64)", "")
    assert time.time() - float(at) < 20


@pytest.mark.parametrize("fails", [False, True])
def test_unused_reader_is_closed_without_the_garbage_collector(tmp_path: Path, fails: bool) -> None:
    """The collector may run in a thread of the data set, for which the reader then waits: the program never ends."""
    for name in "ab":
        texts = ["Capital" if fails and i == 9 else story(60, i) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    documents = open_mixture([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], streaming=True)

    def use() -> None:
        stream = TokenStream(documents, Letters(), 16, batch_characters=200)
        if fails:
            with pytest.raises(OverflowError, match="a capital"):
                stream.next_contexts(1000)
        else:
            stream.first_contexts(4)
            stream.next_contexts(3)
            stream.load_state_dict(stream.state_dict())
            stream.next_contexts(3)

    def of_datasets() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name}

    gc.collect()
    before = of_datasets()  # what other tests have left
    gc.disable()
    try:
        use()
        deadline = time.monotonic() + 20
        while of_datasets() - before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert of_datasets() - before == set()
    finally:
        gc.enable()
