"""Turn texts into token ids, without special tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

Tokenize = Callable[[list[Any]], Sequence[Sequence[int]]]


def tokenizer_function(tokenizer: Any) -> Tokenize:
    """A function from texts to the ids of each, by the Rust part of a Hugging Face tokenizer where it has one.

    The function works on a copy of the Rust part, because a tokenizer refuses changes (of padding or truncation) while
    a thread uses it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
