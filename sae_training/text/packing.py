"""Put the ids of documents into one stream, and cut the stream into contexts.

    ids of each document --lay_out--> one batch --append--> the ids not packed yet --pack--> contexts

Contexts must not depend on where batches begin, so `lay_out` is told the id before the batch, and `append` shortens
runs of BOS that cross the border.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Separator = Literal["auto", "bos", "eos", "sep", "none"] | int


def lay_out(
    ids_of_chunk: Sequence[Sequence[int] | np.ndarray],
    starts_document: Sequence[bool],
    bos_id: int | None,
    separator_id: int | None,
    last_id: int | None,
) -> np.ndarray:
    """The ids of a batch of chunks, one after the other, (n,) int64.

    bos_id: put before every document.
    separator_id: put between two documents, unless the first ends with it or the second begins with it. If both do,
        the second loses its own.
    last_id: the id before this batch; None at the start of the stream.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for chunk_ids, starts in zip(ids_of_chunk, starts_document, strict=True):
        ids = np.asarray(chunk_ids, dtype=np.int64)
        if len(ids) == 0:
            continue
        if starts and bos_id is not None:
            parts.append(np.array([bos_id], dtype=np.int64))
        if starts and separator_id is not None and last_id is not None:
            if last_id == separator_id:
                ids = ids[1:] if ids[0] == separator_id else ids
            elif ids[0] != separator_id:
                parts.append(np.array([separator_id], dtype=np.int64))
        parts.append(ids)
        last_id = int(ids[-1]) if len(ids) > 0 else last_id
    return np.concatenate(parts)


def append(pending: np.ndarray, ids: np.ndarray, bos_id: int | None) -> np.ndarray:
    """`ids` after `pending`, with every run of BOS shortened to one, because documents may begin or end with BOS."""
    joined = np.concatenate([pending, ids])
    if bos_id is None or len(joined) == 0:
        return joined
    is_bos = joined == bos_id
    return joined[np.concatenate([[True], ~(is_bos[1:] & is_bos[:-1])])]


def pack(ids: np.ndarray, context_size: int, bos_id: int | None, limit: int) -> tuple[np.ndarray, int]:
    """(contexts (n, context_size), number of ids they used), with at most `limit` contexts, all of them full.

    With `bos_id`, every context begins with it: a context whose first id is another gets it in front, and takes one id
    less.
    """
    shortest = context_size if bos_id is None else context_size - 1
    rows = np.empty((min(limit, len(ids) // shortest), context_size), dtype=np.int64)
    n_rows = used = 0
    while n_rows < len(rows):
        n_put = 0
        if bos_id is not None and used < len(ids) and ids[used] != bos_id:
            n_put, rows[n_rows, 0] = 1, bos_id
        end = used + context_size - n_put
        if end > len(ids):
            break
        rows[n_rows, n_put:] = ids[used:end]
        n_rows, used = n_rows + 1, end
    return rows[:n_rows], used


def bos_id_of(tokenizer: Any) -> int | None:
    """The id that starts contexts: BOS, else EOS; None without a tokenizer, and, with a warning, if it has neither."""
    if tokenizer is None:
        return None
    for name in ("bos_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None:
            return int(token_id)
    warnings.warn(
        "prepend_bos: the tokenizer has neither a BOS nor an EOS token, so documents and contexts are packed without "
        "one (prepend_bos=False does the same without this warning)",
        stacklevel=3,
    )
    return None


def separator_id_of(tokenizer: Any, separator: Separator, vocab_size: int | None) -> int | None:
    """The id of a separator other than "auto"; None for "none".

    Raises ValueError if the tokenizer has no such token, or the model (with `vocab_size` ids) no such id.
    """
    if separator == "none":
        return None
    token_id: Any = separator
    if isinstance(separator, str):
        token_id = getattr(tokenizer, f"{separator}_token_id", None)
        if token_id is None:
            raise ValueError(
                f"sequence_separator_token: found {separator!r}, but the tokenizer has no {separator.upper()} token; "
                "choose another, the id of a token, or none"
            )
    if token_id < 0 or vocab_size is not None and token_id >= vocab_size:
        named = separator if token_id == separator else f"{separator!r}, which the tokenizer says is {token_id}"
        expected = "0 or more" if vocab_size is None else f"an id of the model's vocabulary, 0 to {vocab_size - 1}"
        raise ValueError(f"sequence_separator_token: found {named}, expected {expected}; choose another")
    return int(token_id)
