"""Tokenise one batch of documents ahead of need, in a thread.

    batches of documents --a thread reads and tokenises the next one--> BatchesAhead --taken in order--> contexts

A thread in this process is enough, because a fast tokenizer runs outside Python's lock. On 2 busy cores, beside a
forward pass of the demo model, the thread made over 80,000 tokens/s, several times what the model took (docs/log.md).
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Iterator

import numpy as np

from sae_training.text.documents import Chunk
from sae_training.text.tokenize import Tokenize

# Longer than a batch takes, unless its text comes from a network that has stalled.
_SECONDS_TO_WAIT_AT_EXIT = 5


class BatchesAhead:
    """Chunks of each batch with their token ids, in order.

    Each batch has a thread of its own, so that no thread is left waiting when the program ends.

    An instance must not be part of a reference cycle: its reader of the data must be closed as soon as nobody uses the
    instance. The cyclic garbage collector might close the reader later, in a thread of `datasets`. That thread would
    then wait for itself, forever.
    """

    def __init__(self, batches: Iterator[list[Chunk]], tokenize: Tokenize) -> None:
        self._batches = batches
        self._tokenize = tokenize
        self._ready: tuple[list[Chunk], list[np.ndarray]] | BaseException | None = None
        self._start_next()

    def next(self) -> tuple[list[Chunk], list[np.ndarray]] | None:
        """The next batch, None at the end. Raises what reading or tokenising the batch raised."""
        self._thread.join()
        ready = self._ready
        if isinstance(ready, BaseException):
            raise ready
        if ready is not None:
            self._start_next()
        return ready

    def _start_next(self) -> None:
        self._thread = threading.Thread(target=self._work, name="tokens-ahead", daemon=True)
        _running.add(self._thread)
        self._thread.start()

    def _work(self) -> None:
        try:
            chunks = next(self._batches, None)
            if chunks is None:
                self._ready = None
            else:
                found = self._tokenize([chunk.content for chunk in chunks])
                self._ready = chunks, [np.asarray(ids, dtype=np.int64) for ids in found]
        except BaseException as error:  # `next` raises it in the caller's thread
            self._batches = iter(())  # closes the reader, because the error's traceback holds on to this instance
            self._ready = error


_running: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _wait_for_threads() -> None:
    # A daemon thread inside native code can abort the interpreter while it shuts down.
    for thread in list(_running):
        thread.join(timeout=_SECONDS_TO_WAIT_AT_EXIT)
