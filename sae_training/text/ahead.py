"""Tokenising ahead of need: in a thread at first, then in processes if it goes on.

    batches of documents --read in order by a thread--> encoded there, or by one of `n_processes` --> taken in order

Which of them encodes a batch changes nothing but the time it takes.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from typing import Any

import cloudpickle
import numpy as np
from loky import ProcessPoolExecutor

from sae_training.text.documents import Chunk
from sae_training.text.tokenize import Encode, encode_in_process, start_process

# Batches of a pass that the thread encodes, so that short texts and short runs start no process.
_BATCHES_IN_THREAD = 2
# Idle processes end after this; the next batch starts them again.
_IDLE_SECONDS = 300
# A process is there so that the model keeps the other cores.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


_NOT_YET = object()


class BatchesAhead:
    """The chunks of each batch with their ids, in order, one batch ahead of need, or one more than processes.

    A thread lives for one batch, so none is left waiting when the program ends.

    It must not refer to itself: as soon as nobody uses it, the reader of the batches is closed. Were it left to the
    cyclic garbage collector, that could happen in a thread of `datasets`, which then waits for itself, forever.
    """

    def __init__(self, batches: Iterator[list[Chunk]], encode: Encode, processes: Processes | None) -> None:
        self._batches = batches
        self._encode = encode
        self._processes = processes
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._end: Any = _NOT_YET  # None or an error, once it has come to that
        self._n_begun = self._n_taken = 0
        self._thread: threading.Thread | None = None
        self._begin()

    def next(self) -> tuple[list[Chunk], list[np.ndarray]] | None:
        """The next batch, None at the end. Raises what reading or encoding it raised."""
        found = self._ready.get() if self._end is _NOT_YET else self._end
        if found is None or isinstance(found, BaseException):
            self._end = found  # for whoever asks again
            if found is None:
                return None
            raise found
        self._n_taken += 1
        self._begin()
        chunks, ids = found
        if isinstance(ids, Future):
            assert self._processes is not None
            ids = self._processes.result(ids)
            if ids is None:
                ids = self._encode_here([chunk.content for chunk in chunks])
        return chunks, ids

    def _begin(self) -> None:
        n_ahead = 1
        if self._processes is not None and self._n_taken >= _BATCHES_IN_THREAD:
            n_ahead = self._processes.n + 1
        while self._n_begun < self._n_taken + n_ahead:
            arguments = self._thread, self._n_begun >= _BATCHES_IN_THREAD
            self._thread = threading.Thread(target=self._work, args=arguments, name="tokens-ahead", daemon=True)
            _running.add(self._thread)
            self._thread.start()
            self._n_begun += 1

    def _work(self, before: threading.Thread | None, may_leave_it: bool) -> None:
        if before is not None:
            before.join()
        try:
            chunks = next(self._batches, None)
            if chunks is None:
                self._ready.put(None)
                return
            contents = [chunk.content for chunk in chunks]
            ids = self._processes.submit(contents) if may_leave_it and self._processes is not None else None
            self._ready.put((chunks, self._encode_here(contents) if ids is None else ids))
        except BaseException as error:  # handed to the caller of next()
            self._batches = iter(())  # whose reader is closed with this
            self._ready.put(error)

    def _encode_here(self, contents: list[Any]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int64) for ids in self._encode(contents)]


class Processes:
    """`n` processes that encode texts, started when there is a first one; all streams of a tokenizer share them.

    Once anything goes wrong there, this process does their work: nothing is lost, and it is said once.
    """

    def __init__(self, n: int, encode: Encode, notify: Callable[[str], None]) -> None:
        self.n = n
        self._encode = encode
        self._notify = notify
        self._pool: _Pool | None = None
        self._failed = False

    def submit(self, texts: list[Any]) -> Future[Any] | None:
        """What will be the ids; None if they are to be encoded here."""
        if self._failed:
            return None
        try:
            self._pool = self._pool or _pool_of(self.n, self._encode)
            return None if self._pool.failed else self._pool.executor.submit(encode_in_process, texts)
        except Exception as error:  # a tokenizer that cannot be sent, a machine without semaphores, a broken pool
            self._give_up(error)
            return None

    def result(self, future: Future[Any]) -> list[np.ndarray] | None:
        """The ids of each text; None if they are to be encoded here."""
        try:
            ids, lengths = future.result()
        except Exception as error:  # if it is the text's fault, encoding it here raises it again
            self._give_up(error)
            return None
        return np.split(ids, np.cumsum(lengths)[:-1])

    def _give_up(self, error: Exception) -> None:
        was_said = self._failed or self._pool is not None and self._pool.failed
        self._failed = True
        if self._pool is not None:
            self._pool.failed = True
        if not was_said:
            first_line = next(iter(str(error).splitlines()), "")
            reason = "one has died" if isinstance(error, BrokenExecutor) else f"{type(error).__name__}: {first_line}"
            self._notify(
                f"tokenizer_processes: no more text goes to them ({reason}); nothing is lost, a thread of this process "
                "tokenises from here on"
            )


class _Pool:
    def __init__(self, n: int, pickled: bytes) -> None:
        self.failed = False
        # These start by neither a fork, which threads of torch do not survive, nor an import of the user's script,
        # which would run it again.
        self.executor = ProcessPoolExecutor(
            n, timeout=_IDLE_SECONDS, initializer=start_process, initargs=(pickled, os.getpid()), env=_ONE_THREAD
        )


_pools: dict[tuple[int, str], _Pool] = {}
_pools_lock = threading.Lock()


def _pool_of(n: int, encode: Encode) -> _Pool:
    pickled = cloudpickle.dumps(encode)
    key = n, hashlib.sha256(pickled).hexdigest()
    with _pools_lock:
        if key not in _pools:
            _pools[key] = _Pool(n, pickled)
            # After loky has registered its own, which comes later and waits for what is under way.
            _pools[key].executor.submit(os.getpid)
            if len(_pools) == 1:
                threading._register_atexit(_kill_processes)  # pyright: ignore[reportAttributeAccessIssue]
        return _pools[key]


def _kill_processes() -> None:
    for pool in _pools.values():
        pool.failed = True
        pool.executor.shutdown(wait=True, kill_workers=True)


_running: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _wait_for_threads() -> None:
    # A daemon thread that is inside native code while the interpreter goes down can abort it.
    for thread in list(_running):
        thread.join(timeout=5)
