"""Documents laid out as one stream of ids, and the stream cut into contexts.

Batches of documents are laid out and joined one after the other; which they are must not show in the contexts, so all
that crosses their borders (the id before, a run of BOS) is looked after here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Separator = Literal["auto", "bos", "eos", "sep", "none"] | int


def lay_out(
    ids_of_chunk: Sequence[Sequence[int] | np.ndarray],
    starts_document: Sequence[bool],
    bos_id: int | None,
    separator_id: int | None,
    last_id: int | None,
) -> np.ndarray:
    """The ids of documents (or pieces of them) as one run, after a stream that ended with `last_id` (None: not begun).

    bos_id stands before every document, separator_id between two. A document that begins with the separator after one
    that ends with it loses its own.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for found, starts in zip(ids_of_chunk, starts_document, strict=True):
        ids = np.asarray(found, dtype=np.int64)
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


def join(pending: np.ndarray, tokens: np.ndarray, bos_id: int | None) -> np.ndarray:
    """One after the other, runs of BOS made one: documents may bring their own, or end with it."""
    joined = np.concatenate([pending, tokens])
    if bos_id is None or len(joined) == 0:
        return joined
    is_bos = joined == bos_id
    return joined[np.concatenate([[True], ~(is_bos[1:] & is_bos[:-1])])]


def pack(tokens: np.ndarray, context_size: int, bos_id: int | None, limit: int) -> tuple[np.ndarray, int]:
    """(at most `limit` full contexts from the front of a run of ids, how many ids they used up).

    With a BOS, a context whose first id is not one gets one put in front and takes one id less.
    """
    shortest = context_size if bos_id is None else context_size - 1
    rows = np.empty((min(limit, len(tokens) // shortest), context_size), dtype=np.int64)
    n_rows = used = 0
    while n_rows < len(rows):
        n_put = 0
        if bos_id is not None and used < len(tokens) and tokens[used] != bos_id:
            n_put, rows[n_rows, 0] = 1, bos_id
        end = used + context_size - n_put
        if end > len(tokens):
            break
        rows[n_rows, n_put:] = tokens[used:end]
        n_rows, used = n_rows + 1, end
    return rows[:n_rows], used


def bos_id_of(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The id that starts contexts; None, with a warning, where the tokenizer has neither BOS nor EOS."""
    for token_id in (
        getattr(tokenizer, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if token_id is not None:
            return int(token_id)
    warnings.warn(
        "prepend_bos: the tokenizer has neither a BOS nor an EOS token, so documents and contexts "
        "are packed without one (prepend_bos=False says the same without this warning)",
        stacklevel=3,
    )
    return None


def separator_id_of(
    tokenizer: PreTrainedTokenizerBase | None, separator: Separator, vocab_size: int | None
) -> int | None:
    """The id that a separator other than "auto" stands for."""
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


def too_large_id(token_id: int, vocab_size: int, found: str) -> ValueError:
    return ValueError(
        f"dataset_path: {found} token id {token_id}, but the model's vocabulary has {vocab_size} "
        f"ids (0 to {vocab_size - 1}); use the model's own tokenizer, and text or ids made for it"
    )
