"""Documents read in order from any saved position, whatever data set they come from.

open_documents --> Documents --read(position)--> Chunk, Chunk, ... --> TokenStream
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# JSON-safe place in a document source; what the keys mean is the source's own business.
Position = dict[str, Any]

# Longer documents are handed out in pieces, so that memory and saved states stay small.
MAX_CHUNK_LENGTH = 1_000_000
SAMPLE_ROWS, SAMPLE_PARTS = 64, 16  # of which a fingerprint is made: documents, and places in each


class Chunk(NamedTuple):
    """A document or, of one longer than MAX_CHUNK_LENGTH, a piece of it."""

    content: str | Sequence[int]
    starts_document: bool
    next_position: Position


class Documents:
    """The documents of one data set in a fixed order, readable from any saved position.

    A map-style data set is positioned by its row index, a streamed one by the state that `datasets`
    gives. That state lacks the content of a shuffle buffer: behind one, the rows before the
    position are read again, which is exact if the shuffle has a seed.

    `ends_with` says what has run out where the documents end, if that is not the whole of `name`.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        column: str,
        is_tokenized: bool,
        name: str,
        ends_with: str | None = None,
    ) -> None:
        self.name = name
        self.ends_with = ends_with or name
        self.column = column
        self.is_tokenized = is_tokenized
        # Only a map-style data set has a length.
        self.n_rows = len(dataset) if hasattr(dataset, "__len__") else None  # pyright: ignore[reportArgumentType]
        self.dataset: Any = dataset
        if self.n_rows is not None:
            self._kind = "rows"
        else:
            self._kind = "replayed stream" if _has_shuffle_buffer(dataset) else "stream"

    def start(self) -> Position:
        """Position of the first document."""
        position: Position = {
            "kind": self._kind,
            "column": self.column,
            "is_tokenized": self.is_tokenized,
            "n_rows": self.n_rows,
            "content": self.fingerprint,
            "row": 0,
            "offset": 0,
        }
        return position | {"stream": None} if self._kind == "stream" else position

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A hash of SAMPLE_ROWS evenly spaced documents, which tells a text from another version of it; None where
        only a stream could be read.
        """
        if self.n_rows is None:
            return None
        digest = hashlib.sha256()
        for row in dict.fromkeys(i * (self.n_rows - 1) // (SAMPLE_ROWS - 1) for i in range(SAMPLE_ROWS)):
            content = self.dataset[row][self.column]
            content = () if content is None else content
            parts = [content[i * len(content) // SAMPLE_PARTS :][:100] for i in range(SAMPLE_PARTS)]
            digest.update(repr((len(content), parts, content[-100:])).encode())
        return digest.hexdigest()[:16]

    def check_position(self, position: Position) -> None:
        """Raise ValueError for a position that was taken from another source."""
        start = self.start()
        for key in ("kind", "column", "is_tokenized", "n_rows", "content"):
            found, expected = start[key], position.get(key)
            if found == expected or key == "content" and expected is None:  # as earlier versions have it
                continue
            advice = "the text itself has changed since; give that of then"
            if key != "content":
                advice = "give the data set, streaming and dataset_text_column of then"
            raise ValueError(
                f"the saved position is of a source with {key} {expected!r}, but {self.name} has {key} {found!r}; "
                f"{advice}"
            )

    def read(self, position: Position | None = None) -> Iterator[Chunk]:
        """Chunks from a position on, to the end of the data; empty documents are left out.

        Readers are independent of each other.
        """
        position = self.start() if position is None else position
        rows = self._stream(position) if self.n_rows is None else self._rows(position)
        offset = position["offset"]
        for content, here, after in rows:
            content = () if content is None else content
            length = len(content)
            while offset < length:
                end = _chunk_end(content, offset)
                if end < length:
                    yield Chunk(content[offset:end], offset == 0, here | {"offset": end})
                else:
                    yield Chunk(content[offset:], offset == 0, after)
                offset = end
            offset = 0

    def _rows(self, position: Position) -> Iterator[tuple[Any, Position, Position]]:
        """(content, position of this row, position of the next) of a map-style data set."""
        here = position | {"offset": 0}
        for row in range(position["row"], self.n_rows or 0):
            after = here | {"row": row + 1}
            yield self.dataset[row][self.column], here, after
            here = after

    def _stream(self, position: Position) -> Iterator[tuple[Any, Position, Position]]:
        """The same of a streamed data set."""
        stream = independent_copy(self.dataset)
        if self._kind == "stream":
            if position["stream"] is not None:
                stream.load_state_dict(copy.deepcopy(position["stream"]))
            examples = iter(stream)
        else:
            examples = itertools.islice(iter(stream), position["row"], None)
        here = position | {"offset": 0}
        for row in itertools.count(position["row"]):
            try:
                example = next(examples, None)
            except (KeyError, IndexError) as error:
                if row == position["row"] and row > 0:
                    error.add_note(f"the saved position does not fit {self.name}: has it changed?")
                raise
            if example is None:
                return
            after = here | {"row": row + 1}
            if self._kind == "stream":
                after["stream"] = stream.state_dict()
            yield example[self.column], here, after
            here = after


def independent_copy(dataset: Any) -> Any:
    """A data set to read or to set to a position, leaving every other reader of it alone.

    A streaming data set keeps where its one reader stands inside itself, even in what its own
    methods (`take`, `with_format`, ...) return.
    """
    # Its hub file systems belong to the whole process, which may open one at any moment.
    shared = getattr(dataset, "_IterableDataset__hffs_cache", None)
    return copy.deepcopy(dataset, {id(shared): shared})


def _has_shuffle_buffer(dataset: object) -> bool:
    # No public attribute tells; the state of a shuffled stream looks like any other.
    parts = [getattr(dataset, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        parts += [p for p in [getattr(part, "ex_iterable", None)] if p is not None]
        parts += list(getattr(part, "ex_iterables", []))
    return False


def pieces(content: str) -> Iterator[str]:
    """The pieces in which a text is handed out."""
    start = 0
    while start < len(content):
        end = _chunk_end(content, start)
        yield content[start:end]
        start = end


def _chunk_end(content: str | Sequence[int], start: int) -> int:
    """Where the chunk that begins at `start` ends.

    Text is cut before a blank between two words, where pre-tokenizers cut too, so that the pieces
    give the tokens of the whole; failing that after a newline, failing that anywhere.
    """
    end = start + MAX_CHUNK_LENGTH
    if end >= len(content):
        return len(content)
    if not isinstance(content, str):
        return end
    lowest = start + MAX_CHUNK_LENGTH // 2
    blank = content.rfind(" ", lowest, end)
    while blank > lowest:
        if content[blank - 1].isalnum() and content[blank + 1].isalnum():
            return blank
        blank = content.rfind(" ", lowest, blank)
    newline = content.rfind("\n", lowest, end)
    return newline + 1 if newline >= 0 else end
