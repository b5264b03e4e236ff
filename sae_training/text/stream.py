"""Serve contexts of token ids, from documents, to the language model.

    Documents --read and tokenised ahead of need--> one stream of ids, with BOS or a separator between documents
      --packed--> contexts 0, 1, 2, ... of an epoch --every 20th kept for evaluation--> TokenStream

Contexts are the same in every epoch, and held-out contexts are never trained on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_training.text.ahead import BatchesAhead
from sae_training.text.documents import Chunk, Documents, Position
from sae_training.text.packing import (
    PADDING,
    Separator,
    append,
    bos_id_of,
    lay_out,
    one_by_one,
    pack,
    separator_id_of,
)
from sae_training.text.rows import rows_as_read, sample_of
from sae_training.text.tokenize import Tokenize, tokenizer_function

_logger = logging.getLogger("sae_training")


class TokenStream:
    """Endless training contexts from documents, resumable after any call.

    context_size: tokens of a context, BOS included.
    prepend_bos: True starts every document and every context with exactly one BOS (bos_token_id of the tokenizer, else
        its eos_token_id). False puts documents one after the other as they are.
    separator: what stands between two documents, without doubling what a document brings. With any but "auto", BOS
        starts contexts only, not documents.
    n_held_out, held_out_every: contexts held_out_every - 1, 2 * held_out_every - 1, ... of an epoch, n_held_out of
        them, are for evaluation and never come from `next_contexts`.
    vocab_size: ids from here on are an error, or a bad row where rows hold ids; None checks none.
    pack_sequences: False puts one document, or a part of a longer one, into each context, and PADDING after it.
    notify: called with a message when the data has ended and a second epoch begins, and with what rows of token ids
        were found to be.
    batch_characters, batch_tokens: how much of a text, or of token ids, is read at a time. Contexts do not depend on
        these.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        context_size: int,
        prepend_bos: bool = True,
        n_held_out: int = 0,
        held_out_every: int = 20,
        vocab_size: int | None = None,
        notify: Callable[[str], None] = _logger.info,
        separator: Separator = "auto",
        batch_characters: int = 1_000_000,
        batch_tokens: int = 250_000,
        pack_sequences: bool = True,
    ) -> None:
        bos_id = bos_id_of(tokenizer) if prepend_bos else None
        smallest = 1 if bos_id is None else 2
        if context_size < smallest:
            raise ValueError(f"context_size: found {context_size}, expected {smallest} or more; change it")
        if held_out_every < 2:
            raise ValueError(f"held_out_every: found {held_out_every}, expected 2 or more; change it")
        if tokenizer is None and not documents.is_tokenized:
            raise ValueError(f"tokenizer: found None, but {documents.given.name} holds text; pass a tokenizer")
        self.context_size = context_size
        self.n_held_out = n_held_out
        self.held_out_every = held_out_every
        self.pack_sequences = pack_sequences
        document_bos_id = bos_id if separator == "auto" else None
        self._is_running_text = False
        is_judged = documents.is_tokenized and pack_sequences and separator in ("auto", "none")
        if documents.masks or is_judged and document_bos_id is not None:
            documents, is_packed = rows_as_read(documents, document_bos_id, is_judged, notify)
            self._is_running_text = is_packed and document_bos_id is not None
        self._documents = documents = documents.with_vocabulary(vocab_size)
        self._source = _TokenSource(
            documents,
            list if documents.is_tokenized else tokenizer_function(tokenizer),
            bos_id,
            PADDING if not pack_sequences else None if self._is_running_text else document_bos_id,
            None if separator == "auto" else separator_id_of(tokenizer, separator, vocab_size),
            vocab_size,
            batch_tokens if documents.is_tokenized else batch_characters,
            pack_sequences,
        )
        self._notify = notify
        self.epoch = 0
        self._contexts = self._contexts_from()

    @property
    def context_index(self) -> int:
        """Number of contexts of this epoch that have been passed, held-out contexts included."""
        return self._contexts.place.context_index

    def next_contexts(self, n: int, until_end: bool = False) -> Tensor:
        """The next n training contexts, int64 (n, context_size), with PADDING after the end of one.

        With `until_end` there are fewer at the end of the data, and then none; without, it starts again. An error uses
        up none.
        """
        before = self.epoch, self._contexts.place
        taken = [np.empty((0, self.context_size), dtype=np.int64)]
        n_missing = n
        try:
            while n_missing > 0:
                first = self.context_index
                rows = self._contexts.take(n_missing)
                if len(rows) == 0:
                    if until_end:
                        break
                    self._start_epoch()
                    continue
                rows = rows[~self._is_held_out(np.arange(first, first + len(rows)))]
                taken.append(rows)
                n_missing -= len(rows)
        except BaseException:
            self.epoch, self._contexts = before[0], self._contexts_from(before[1])
            raise
        return torch.from_numpy(np.concatenate(taken))

    def held_out_contexts(self) -> Tensor:
        """All held-out contexts, (up to n_held_out, context_size), wherever the stream stands."""
        if self.n_held_out == 0:
            return torch.empty((0, self.context_size), dtype=torch.int64)
        contexts = self._first(self.n_held_out * self.held_out_every)
        held_out = contexts[self._is_held_out(np.arange(len(contexts)))]
        if len(held_out) == 0:
            raise ValueError(
                f"held-out data: {self._documents.given.name} has only {len(contexts)} contexts of "
                f"{self.context_size} tokens, and number {self.held_out_every} is the first to be held "
                "out; give eval_dataset_path, more text or a smaller context_size"
            )
        return torch.from_numpy(held_out)

    def first_contexts(self, n: int) -> Tensor:
        """The first n contexts of the data (fewer if it ends), held out or not."""
        return torch.from_numpy(self._first(n))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next contexts depend on. All but `pending` is JSON-safe."""
        place = self._contexts.place
        state = {
            "epoch": self.epoch,
            "context_index": place.context_index,
            "pending": torch.from_numpy(place.pending.copy()),
            "source": json.loads(json.dumps(place.position)),
        }
        if self._is_running_text:
            state["running_text"] = True
        return state if self._source.separator_id is None else state | {"last_id": place.last_id}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `state` is of another data set, or of rows that were read in another way."""
        self._documents.check_position(state["source"])
        if bool(state.get("running_text")) != self._is_running_text:
            ways = ("documents, with BOS between them", "one running text")
            raise ValueError(
                f"the saved position is of rows read as {ways[not self._is_running_text]}, but those of "
                f"{self._documents.given.name} are read as {ways[self._is_running_text]} now; begin anew"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. Raises ValueError as `check_state` does."""
        self.check_state(state)
        self.epoch = state["epoch"]
        pending = state["pending"].cpu().numpy().copy()
        place = _Place(state["context_index"], pending, state["source"], state.get("last_id"))
        self._contexts = self._contexts_from(place)

    def _contexts_from(self, place: _Place | None = None) -> _Contexts:
        if place is None:
            place = _Place(0, np.empty(0, dtype=np.int64), self._documents.start(), None)
        return _Contexts(self._source, self.context_size, place)

    def _start_epoch(self) -> None:
        self._require_a_context(self._contexts.place)
        if self.epoch == 0:
            self._notify(
                f"end of {self._documents.ends_with} after {self.context_index:,} contexts of {self.context_size} "
                "tokens; starting it again (later epochs are not announced)"
            )
        self.epoch += 1
        self._contexts = self._contexts_from()

    def _first(self, n: int) -> np.ndarray:
        contexts = self._contexts_from()
        taken = [np.empty((0, self.context_size), dtype=np.int64)]
        while (n_missing := n - contexts.place.context_index) > 0 and len(rows := contexts.take(n_missing)) > 0:
            taken.append(rows)
        if n > 0:
            self._require_a_context(contexts.place)
        return np.concatenate(taken)

    def _require_a_context(self, end: _Place) -> None:
        if end.context_index == 0:
            given = self._documents.given
            sample = sample_of(self._documents) if self._documents.masks and len(end.pending) == 0 else []
            if sample and not any(row.n_kept for row in sample):
                raise ValueError(
                    f"{given.field}: {given.name} holds no id that counts: all {sum(row.n_ids for row in sample):,} "
                    f"ids in {len(sample)} rows are masked by {' or '.join(self._documents.masks)}; correct the "
                    "column, or remove it to read all ids"
                )
            if not self.pack_sequences:
                raise ValueError(f"{given.field}: {given.name} holds no token; give a text that does")
            raise ValueError(
                f"{given.field}: {given.name} holds {len(end.pending)} tokens in all, but one context takes "
                f"context_size={self.context_size}; give more text or a smaller context_size"
            )

    def _is_held_out(self, index: np.ndarray) -> np.ndarray:
        every = self.held_out_every
        return (index % every == every - 1) & (index // every < self.n_held_out)


@dataclass(frozen=True)
class _Place:
    """A place in an epoch: how many contexts lie behind, the ids not packed yet, and where to read on after them."""

    context_index: int
    pending: np.ndarray
    position: Position
    last_id: int | None
    """The id before `position`, which may be packed already; None at the start."""


class _Contexts:
    """The contexts of one epoch, in order, from a place on."""

    def __init__(self, source: _TokenSource, context_size: int, place: _Place) -> None:
        self.place = place
        self._source = source
        self._context_size = context_size
        self._batches = source.batches(place.position, place.last_id)  # starts to read at the first `take`

    def take(self, limit: int) -> np.ndarray:
        """The next contexts, between 1 and `limit` of them; none at the end of the data."""
        is_end = False
        while True:
            place = self.place
            rows, n_used = self._source.contexts(place.pending, self._context_size, limit, is_end)
            if len(rows) > 0:
                n_behind = place.context_index + len(rows)
                self.place = replace(place, context_index=n_behind, pending=place.pending[n_used:])
                return rows
            batch = None if is_end else next(self._batches, None)
            if batch is None:
                if is_end:
                    return rows
                is_end = True
                continue
            ids, position = batch
            pending = append(place.pending, ids, self._source.document_bos_id)
            last_id = int(pending[-1]) if len(pending) > 0 else place.last_id
            self.place = _Place(place.context_index, pending, position, last_id)


@dataclass(frozen=True)
class _TokenSource:
    """Token ids of documents in batches, with BOS or a separator between documents."""

    documents: Documents
    tokenize: Tokenize
    bos_id: int | None
    document_bos_id: int | None
    separator_id: int | None
    vocab_size: int | None
    batch_length: int
    """How many characters, or ids of a data set of token ids, are read at a time."""
    joins: bool
    """Whether a context may hold parts of several documents."""

    def __post_init__(self) -> None:
        if self.bos_id is not None and self.vocab_size is not None and self.bos_id >= self.vocab_size:
            told = self._too_large_id(self.bos_id, self.vocab_size, "the tokenizer has, for BOS,")
            raise ValueError(f"{told}, or set prepend_bos to False")

    def batches(self, position: Position, last_id: int | None) -> Iterator[tuple[np.ndarray, Position]]:
        """(ids, position after them) of each batch from `position` to the end. `last_id`: the id before `position`."""
        ahead = BatchesAhead(self._read(position), self.tokenize)
        while (batch := ahead.next()) is not None:
            chunks, ids_of_chunk = batch
            self._check_ids(np.concatenate(ids_of_chunk))
            starts = [chunk.starts_document for chunk in chunks]
            ids = lay_out(ids_of_chunk, starts, self.document_bos_id, self.separator_id, last_id)
            if len(ids) > 0:
                last_id = int(ids[-1])
            yield ids, chunks[-1].next_position

    def contexts(self, ids: np.ndarray, context_size: int, limit: int, is_end: bool) -> tuple[np.ndarray, int]:
        """(up to `limit` contexts of `ids`, number of ids they used). `is_end`: the data ends with `ids`."""
        if self.joins:
            return pack(ids, context_size, self.bos_id, limit)
        return one_by_one(ids, context_size, self.bos_id, limit, is_end)

    def _read(self, position: Position) -> Iterator[list[Chunk]]:
        chunks: list[Chunk] = []
        length = 0
        try:
            for chunk in self.documents.read(position):
                chunks.append(chunk)
                length += len(chunk.content)
                if length >= self.batch_length:
                    yield chunks
                    chunks, length = [], 0
        except Exception:  # a bad row, or a network that fails: the documents before it are good
            if chunks:
                yield chunks
            raise
        if chunks:
            yield chunks

    def _check_ids(self, ids: np.ndarray) -> None:
        """Check what the tokenizer made. Rows of token ids are checked where they are read."""
        if len(ids) > 0 and self.vocab_size is not None and ids.max() >= self.vocab_size:
            found = f"the tokenizer gave, on {self.documents.given.name},"
            raise self._too_large_id(int(ids.max()), self.vocab_size, found)

    def _too_large_id(self, token_id: int, vocab_size: int, found: str) -> ValueError:
        return ValueError(
            f"{self.documents.given.field}: {found} token id {token_id}, but the model's vocabulary has {vocab_size} "
            f"ids (0 to {vocab_size - 1}); use the model's own tokenizer"
        )
