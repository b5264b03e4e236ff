"""Small texts, a tokenizer that knows their words, and streams of given token ids."""

from __future__ import annotations

import json
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_training.text.documents import Documents
from sae_training.text.open import open_documents
from sae_training.text.stream import TokenStream

BOS = 0
WORDS = [
    "the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over",
    "mat", "tree", "hill", "and", "then", "it", "was", "not", "seen", "again",
]  # fmt: skip


def make_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> as id 0, trained on WORDS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def story(n_words: int, seed: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i + i) % len(WORDS)] for i in range(n_words))


def stories(n: int = 23) -> list[str]:
    """Documents of 0 to 45 words; every tenth is empty."""
    return [story((i * 13) % 46 if i % 10 != 3 else 0, i) for i in range(n)]


def documents_of(texts: list[str]) -> Documents:
    return open_documents(datasets.Dataset.from_dict({"text": texts}))


def stream_of_ids(ids: list[list[int]], context_size: int, bos: bool = True, **options: Any) -> TokenStream:
    """Read in batches of a few documents, so that small data has many batches."""
    documents = open_documents(datasets.Dataset.from_dict({"tokens": ids}))
    options = {"batch_tokens": 12, **options}
    return TokenStream(documents, make_tokenizer(bos_token="<s>"), context_size, prepend_bos=bos, **options)


def epoch_of(stream: TokenStream) -> list[list[int]]:
    """All contexts from where the stream stands to the end of its epoch, without those held out."""
    epoch, rows = stream.epoch, []
    while True:
        row = stream.next_contexts(1)
        if stream.epoch != epoch:
            return rows
        rows.append(row[0].tolist())


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a stream as a checkpoint keeps it: a tensor and JSON."""
    plain = json.loads(json.dumps({key: state[key] for key in state if key != "pending"}))
    return plain | {"pending": state["pending"].clone()}
