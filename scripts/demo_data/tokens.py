"""Turns the demo text into token ids and the ids into batches that follow from the step alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scripts.demo_data.corpus import write_atomically
from scripts.demo_data.sources import Document

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come first in the vocabulary


def fit_tokenizer(documents: list[Document], folder: Path, vocab_size: int, context: int) -> PreTrainedTokenizerBase:
    """Fit a byte-level BPE with GPT-2's pre-tokenizer, save it and load it from there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte stays representable
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    write_atomically(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
    return AutoTokenizer.from_pretrained(folder)


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One stream of token ids, shape (tokens,), with END_OF_TEXT between documents."""
    stream: list[int] = []
    for ids in tokenizer([d.text for d in documents], verbose=False)["input_ids"]:
        stream += [*ids, END_OF_TEXT_ID]
    return torch.tensor(stream[:-1])


def windows(stream: Tensor, context: int, phase: int = 0) -> Tensor:
    """Contexts of BOS + (context - 1) tokens, shape (contexts, context); every token is a target once."""
    body = stream[phase:]
    body = body[: len(body) // (context - 1) * (context - 1)].view(-1, context - 1)
    return torch.cat([torch.full((len(body), 1), END_OF_TEXT_ID), body], dim=1)


class Batches:
    """The batch of each step; each epoch cuts the stream at other places and shuffles the contexts."""

    def __init__(self, stream: Tensor, context: int, size: int, seed: int) -> None:
        self.stream, self.context, self.size, self.seed = stream, context, size, seed
        self.steps_an_epoch = (len(stream) - context) // (context - 1) // size
        self.epoch, self.rows = -1, stream

    def __getitem__(self, step: int) -> Tensor:
        """Token ids (size, context)."""
        epoch, place = divmod(step, self.steps_an_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(1_000 * self.seed + epoch)
            phase = int(torch.randint(self.context - 1, (), generator=generator))
            rows = windows(self.stream, self.context, phase)
            self.epoch, self.rows = epoch, rows[torch.randperm(len(rows), generator=generator)]
        return self.rows[place * self.size : (place + 1) * self.size]
