"""Texts to token ids, in this process or in one that does nothing else.

A tokenising process imports this file and what the tokenizer needs, which for most is neither torch nor transformers.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[list[Any]], Sequence[Sequence[int]]]


class RustEncoder:
    """By the Rust part of a tokenizer, without special tokens."""

    def __init__(self, backend: Any) -> None:
        # A copy of our own: a tokenizer refuses changes (padding, truncation) while a thread uses it.
        self.backend = copy.deepcopy(backend)
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


class PythonEncoder:
    """By a tokenizer that is all Python."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encoder_of(tokenizer: PreTrainedTokenizerBase | None) -> RustEncoder | PythonEncoder:
    """Texts -> their ids without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return PythonEncoder(tokenizer) if backend is None else RustEncoder(backend)


# ------------------------------------------------------------------------------------------- in a process of its own

_pickled = b""
_encode: Encode | None = None


def start_process(pickled: bytes, parent: int) -> None:
    """Once in each process, first. What is wrong with the tokenizer is for `encode_in_process` to say."""
    global _pickled
    _pickled = pickled
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the run decides when these end
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def encode_in_process(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(the ids of all texts, how many each has): two arrays go through a pipe faster than lists."""
    global _encode
    encode = _encode = _encode or pickle.loads(_pickled)
    found = [np.asarray(ids, dtype=np.int32) for ids in encode(texts)]
    return np.concatenate(found), np.array([len(ids) for ids in found])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # killed, it could not tell its processes to end
