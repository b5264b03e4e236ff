"""Contexts of token ids for the language model, from documents.

    Documents --tokenised ahead of need--> one stream of ids, with BOS or a separator between documents
      --packed--> contexts 0, 1, 2, ... of an epoch --every 20th kept for evaluation--> TokenStream

Contexts are the same in every epoch, and the ones held out are never trained on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sae_training.text.ahead import BatchesAhead, Processes
from sae_training.text.documents import Chunk, Documents, Position
from sae_training.text.packing import Separator, bos_id_of, join, lay_out, pack, separator_id_of, too_large_id
from sae_training.text.tokenize import Encode, encoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is tokenised at a time. Text has about 4 characters to a token.
_BATCH_CHARACTERS = 1_000_000
_BATCH_TOKENS = 250_000

_logger = logging.getLogger("sae_training")


class TokenStream:
    """Endless training contexts from documents, resumable at any call.

    context_size: tokens of a context, BOS included.
    prepend_bos: every document and every context starts with exactly one BOS (the tokenizer's
        bos_token_id, else its eos_token_id); False puts documents one after the other as they are.
    separator: "auto" is that. Any other says what stands between two documents, and prepend_bos then is about
        contexts alone. Also at the end or start of a document it is not doubled.
    n_held_out, held_out_every: contexts held_out_every - 1, 2 * held_out_every - 1, ..., n_held_out
        of them, are for evaluation and never come from `next_contexts`.
    vocab_size: ids from here on are an error, None checks nothing.
    notify: told once when the data has ended and a new epoch begins.
    n_processes: how many tokenise text where there is much of it; 0 is a thread of this process. The contexts are the
        same with any number.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase | None,
        context_size: int,
        prepend_bos: bool = True,
        n_held_out: int = 0,
        held_out_every: int = 20,
        vocab_size: int | None = None,
        notify: Callable[[str], None] = _logger.info,
        separator: Separator = "auto",
        n_processes: int = 0,
    ) -> None:
        bos_id = bos_id_of(tokenizer) if prepend_bos else None
        smallest = 1 if bos_id is None else 2
        if context_size < smallest:
            raise ValueError(f"context_size: got {context_size}, expected at least {smallest}")
        if held_out_every < 2:
            raise ValueError(f"held_out_every: got {held_out_every}, expected at least 2")
        if bos_id is not None and vocab_size is not None and bos_id >= vocab_size:
            raise too_large_id(bos_id, vocab_size, "the tokenizer has, for BOS,")
        if tokenizer is None and not documents.is_tokenized:
            raise ValueError(f"tokenizer: got None, but {documents.name} holds text; pass a tokenizer")
        self.context_size = context_size
        self.n_held_out = n_held_out
        self.held_out_every = held_out_every
        self._documents = documents
        self._source = _TokenSource(
            documents,
            list if documents.is_tokenized else encoder_of(tokenizer),
            n_processes,
            bos_id,
            None if separator == "auto" else separator_id_of(tokenizer, separator, vocab_size),
            separator == "auto",
            vocab_size,
            notify,
        )
        self._notify = notify
        self.epoch = 0
        self._pass = self._new_pass()

    @property
    def context_index(self) -> int:
        """Number of contexts of this epoch that lie behind, those held out included."""
        return self._pass.context_index

    def next_contexts(self, n: int) -> Tensor:
        """The next n training contexts, int64 (n, context_size); on an error none is used up."""
        before = self.epoch, self._pass.place()
        taken = [np.empty((0, self.context_size), dtype=np.int64)]
        n_missing = n
        try:
            while n_missing > 0:
                first = self._pass.context_index
                rows = self._pass.take(n_missing)
                if len(rows) == 0:
                    self._start_epoch()
                    continue
                rows = rows[~self._is_held_out(np.arange(first, first + len(rows)))]
                taken.append(rows)
                n_missing -= len(rows)
        except BaseException:
            self.epoch, self._pass = before[0], self._new_pass(before[1])
            raise
        return torch.from_numpy(np.concatenate(taken))

    def held_out_contexts(self) -> Tensor:
        """The contexts held out, (up to n_held_out, context_size), wherever the stream stands."""
        if self.n_held_out == 0:
            return torch.empty((0, self.context_size), dtype=torch.int64)
        contexts = self._first(self.n_held_out * self.held_out_every)
        held_out = contexts[self._is_held_out(np.arange(len(contexts)))]
        if len(held_out) == 0:
            raise ValueError(
                f"held-out data: {self._documents.name} has only {len(contexts)} contexts of "
                f"{self.context_size} tokens, and number {self.held_out_every} is the first to be held "
                "out; give eval_dataset_path, more text or a smaller context_size"
            )
        return torch.from_numpy(held_out)

    def first_contexts(self, n: int) -> Tensor:
        """The first n contexts of the data (fewer if it ends), held out or not."""
        return torch.from_numpy(self._first(n))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next; all but `pending` is JSON-safe."""
        place = self._pass.place()
        state = {
            "epoch": self.epoch,
            "context_index": place.context_index,
            "pending": torch.from_numpy(place.pending.copy()),
            "source": json.loads(json.dumps(place.position)),
        }
        return state if self._source.separator_id is None else state | {"last_id": place.last_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. Raises ValueError if it is of another source."""
        self._documents.check_position(state["source"])
        self.epoch = state["epoch"]
        pending = state["pending"].cpu().numpy().copy()
        self._pass = self._new_pass(_Place(state["context_index"], pending, state["source"], state.get("last_id")))

    def _new_pass(self, place: _Place | None = None) -> _Pass:
        if place is None:
            place = _Place(0, np.empty(0, dtype=np.int64), self._documents.start(), None)
        return _Pass(self._source, self.context_size, place)

    def _start_epoch(self) -> None:
        self._require_a_context(self._pass)
        if self.epoch == 0:
            self._notify(
                f"end of {self._documents.ends_with} after {self.context_index:,} contexts of "
                f"{self.context_size} tokens: starting it again (not said for later epochs)"
            )
        self.epoch += 1
        self._pass = self._new_pass()

    def _first(self, n: int) -> np.ndarray:
        whole = self._new_pass()
        taken = [np.empty((0, self.context_size), dtype=np.int64)]
        while whole.context_index < n and len(rows := whole.take(n - whole.context_index)) > 0:
            taken.append(rows)
        if n > 0:
            self._require_a_context(whole)
        return np.concatenate(taken)

    def _require_a_context(self, ended: _Pass) -> None:
        if ended.context_index == 0:
            raise ValueError(
                f"dataset_path: {self._documents.name} holds {len(ended.pending)} tokens in all, "
                f"but one context takes context_size={self.context_size}; give more text or a "
                "smaller context_size"
            )

    def _is_held_out(self, index: np.ndarray) -> np.ndarray:
        every = self.held_out_every
        return (index % every == every - 1) & (index // every < self.n_held_out)


@dataclass(frozen=True)
class _Place:
    """Where a pass stands: ids tokenised and not yet packed, and where to read on after them."""

    context_index: int
    pending: np.ndarray
    position: Position
    last_id: int | None
    """The id before `position`, which may be packed already; None at the start."""


class _Pass:
    """One pass over the data from a place on, giving its contexts in order."""

    def __init__(self, source: _TokenSource, context_size: int, place: _Place) -> None:
        self.context_index = place.context_index
        self.pending = place.pending
        self._position = place.position
        self._last_id = place.last_id
        self._source = source
        self._context_size = context_size
        self._batches: Iterator[tuple[np.ndarray, Position]] | None = None

    def place(self) -> _Place:
        return _Place(self.context_index, self.pending, self._position, self._last_id)

    def take(self, limit: int) -> np.ndarray:
        """Between 1 and `limit` contexts; none at the end of the data."""
        if self._batches is None:
            self._batches = self._source.batches(self._position, self._last_id)
        while True:
            rows, n_used = pack(self.pending, self._context_size, self._source.bos_id, limit)
            if len(rows) > 0:
                self.pending = self.pending[n_used:]
                self.context_index += len(rows)
                return rows
            batch = next(self._batches, None)
            if batch is None:
                return rows
            tokens, self._position = batch
            self.pending = self._source.join(self.pending, tokens)
            if len(self.pending) > 0:
                self._last_id = int(self.pending[-1])


class _TokenSource:
    """Batches of token ids from documents, with what stands between them."""

    def __init__(
        self,
        documents: Documents,
        encode: Encode,
        n_processes: int,
        bos_id: int | None,
        separator_id: int | None,
        bos_before_documents: bool,
        vocab_size: int | None,
        notify: Callable[[str], None],
    ) -> None:
        self.bos_id = bos_id
        self.separator_id = separator_id
        self._documents = documents
        self._encode = encode
        self._processes = None
        if n_processes > 0 and not documents.is_tokenized:
            self._processes = Processes(n_processes, encode, notify)
        self._document_bos_id = bos_id if bos_before_documents else None
        self._vocab_size = vocab_size

    def batches(self, position: Position, last_id: int | None) -> Iterator[tuple[np.ndarray, Position]]:
        """(ids, the position after them), to the end of the data; `last_id` is the id before `position`."""
        ahead = BatchesAhead(self._read(position), self._encode, self._processes)
        while (batch := ahead.next()) is not None:
            chunks, ids = batch
            starts = [chunk.starts_document for chunk in chunks]
            tokens = lay_out(ids, starts, self._document_bos_id, self.separator_id, last_id)
            self._check_ids(tokens)
            if len(tokens) > 0:
                last_id = int(tokens[-1])
            yield tokens, chunks[-1].next_position

    def join(self, pending: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return join(pending, tokens, self._document_bos_id)

    def _read(self, position: Position) -> Iterator[list[Chunk]]:
        full = _BATCH_TOKENS if self._documents.is_tokenized else _BATCH_CHARACTERS
        chunks: list[Chunk] = []
        size = 0
        for chunk in self._documents.read(position):
            chunks.append(chunk)
            size += len(chunk.content)
            if size >= full:
                yield chunks
                chunks, size = [], 0
        if chunks:
            yield chunks

    def _check_ids(self, tokens: np.ndarray) -> None:
        if self._vocab_size is None or len(tokens) == 0:
            return
        if tokens.max() >= self._vocab_size:
            found = (
                f"{self._documents.name} has, in column {self._documents.column!r},"
                if self._documents.is_tokenized
                else f"the tokenizer gave, on {self._documents.name},"
            )
            raise too_large_id(int(tokens.max()), self._vocab_size, found)
        if tokens.min() < 0:
            raise ValueError(
                f"dataset_path: {self._documents.name} has token id {int(tokens.min())} in column "
                f"{self._documents.column!r}, expected none below 0; set dataset_text_column to "
                "the column of input ids, or use the text"
            )
