"""Read the documents of a data set in order, from any saved position.

open_documents --> Documents --read(position)--> Chunk, Chunk, ... --> TokenStream
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sae_training.machine.paths import first_line
from sae_training.text.masks import counting_ids

# A JSON-safe place in a data set. Only Documents knows what the keys mean.
Position = dict[str, Any]

# Characters or token ids. Longer documents are read in pieces, so that memory and saved states stay small.
MAX_CHUNK_LENGTH = 1_000_000

# A fingerprint reads this many rows, and characters or ids at this many places of each row.
_SAMPLE_ROWS, _SAMPLE_PLACES = 64, 16


class Chunk(NamedTuple):
    """A document, or a piece of a document that is longer than MAX_CHUNK_LENGTH."""

    content: str | Sequence[int]
    starts_document: bool
    next_position: Position


class Given(NamedTuple):
    """A data set as messages name it: the config field, and the value of that field."""

    field: str
    name: str

    def empty(self) -> ValueError:
        return ValueError(f"{self.field}: {self.name} is empty (0 rows), expected text; give another")

    def unreadable(self, error: Exception) -> ValueError:
        cause = error.__cause__ or error
        return ValueError(
            f"{self.field}: {self.name} could not be read ({type(cause).__name__}: {first_line(cause)}); "
            "check the data, or open it with datasets.load_dataset and pass the object"
        )


class Documents:
    """The documents of one data set in a fixed order, readable from any saved position.

    A map-style data set is positioned by its row index, a streamed one by the state that `datasets` gives. That state
    lacks the content of a shuffle buffer. Rows behind a shuffle buffer are therefore read again from the start, which
    is exact if the shuffle has a seed.

    ends_with: what has run out where the documents end, if that is not all of `given`.
    masks: columns that say which token ids count (`masks`); the others are dropped.
    are_whole: rows are known to be whole documents, and no pieces of a running text.
    parts: those of a mixture.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        is_tokenized: bool,
        given: Given,
        ends_with: str | None = None,
        max_chunk_length: int = MAX_CHUNK_LENGTH,
        masks: tuple[str, ...] = (),
        are_whole: bool = False,
        parts: tuple[Documents, ...] = (),
    ) -> None:
        self.dataset = dataset
        self.column = column
        self.is_tokenized = is_tokenized
        self.given = given
        self.ends_with = ends_with or given.name
        self.max_chunk_length = max_chunk_length
        self.masks = masks
        self.are_whole = are_whole
        self.parts = parts
        # Only a map-style data set has a length.
        self.n_rows: int | None = len(dataset) if hasattr(dataset, "__len__") else None
        if self.n_rows is not None:
            self._kind = "rows"
        else:
            self._kind = "replayed stream" if _has_shuffle_buffer(dataset) else "stream"

    def start(self) -> Position:
        """The position of the first document."""
        position: Position = {
            "kind": self._kind,
            "column": self.column,
            "is_tokenized": self.is_tokenized,
            "n_rows": self.n_rows,
            "content": self.fingerprint,
            "row": 0,
            "offset": 0,
        }
        if self.masks:
            position["masks"] = list(self.masks)
        return position | {"stream": None} if self._kind == "stream" else position

    def content_of(self, row: Any, number: int) -> Any:
        """The text or the ids of row `number`, without masked ids; None if it has none."""
        try:
            return counting_ids(row, self.column, self.masks)
        except ValueError as error:
            raise ValueError(f"{self.given.field}: row {number} of {self.given.name}: {error}") from error

    def sample(self) -> Iterator[tuple[int, Any, bool]]:
        """(number, row with all columns, whether it is the last) of evenly spaced rows, or of the first of a stream."""
        if self.n_rows is not None:
            yield from ((row, self.dataset[row], row == self.n_rows - 1) for row in _spaced(self.n_rows))
            return
        rows = itertools.pairwise(itertools.chain(independent_copy(self.dataset), [None]))
        for number, (row, following) in enumerate(itertools.islice(rows, _SAMPLE_ROWS)):
            yield number, row, following is None

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A hash of 64 evenly spaced documents, which tells a text from another version of it; None for a stream."""
        if self.n_rows is None:
            return None
        digest = hashlib.sha256()
        for row in _spaced(self.n_rows):
            content = self.content_of(self.dataset[row], row)
            content = () if content is None else content
            parts = [content[i * len(content) // _SAMPLE_PLACES :][:100] for i in range(_SAMPLE_PLACES)]
            digest.update(repr((len(content), parts, content[-100:])).encode())
        return digest.hexdigest()[:16]

    def check_position(self, position: Position) -> None:
        """Raise ValueError for a position that was taken from another data set."""
        start = self.start()
        for key in ("kind", "column", "masks", "is_tokenized", "n_rows", "content"):
            found, expected = start.get(key), position.get(key)
            if found == expected or key == "content" and expected is None:  # earlier versions saved no "content"
                continue
            advice = "use the same dataset_path, streaming and dataset_text_column as when the position was saved"
            if key == "content":
                advice = "the text itself has changed since; use the text as it was"
            if key == "masks" and expected is None:
                advice = "ids that these columns mask were read then; remove the columns, or begin anew without the ids"
            raise ValueError(
                f"the saved position is of a source with {key} {expected!r}, but {self.given.name} has {key} "
                f"{found!r}; {advice}"
            )

    def read(self, position: Position | None = None) -> Iterator[Chunk]:
        """Chunks from a position (None: the start) to the end of the data, without empty documents.

        Readers are independent of each other.
        """
        position = self.start() if position is None else position
        rows = self._stream(position) if self.n_rows is None else self._rows(position)
        offset = position["offset"]
        for content, here, after in rows:
            content = () if content is None else content
            for start, end in pieces(content, self.max_chunk_length, offset):
                next_position = after if end == len(content) else here | {"offset": end}
                yield Chunk(content[start:end], start == 0, next_position)
            offset = 0

    def _rows(self, position: Position) -> Iterator[tuple[Any, Position, Position]]:
        """(content, position of the row, position of the next row) for each row of a map-style data set."""
        here = position | {"offset": 0}
        for row in range(position["row"], self.n_rows or 0):
            after = here | {"row": row + 1}
            yield self.content_of(self.dataset[row], row), here, after
            here = after

    def _stream(self, position: Position) -> Iterator[tuple[Any, Position, Position]]:
        """(content, position of the row, position of the next row) for each row of a streamed data set."""
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
                    error.add_note(f"the saved position does not fit {self.given.name}: has it changed?")
                raise
            if example is None:
                return
            after = here | {"row": row + 1}
            if self._kind == "stream":
                after["stream"] = stream.state_dict()
            yield self.content_of(example, row), here, after
            here = after


def _spaced(n_rows: int) -> list[int]:
    """Up to _SAMPLE_ROWS numbers of rows, evenly spaced, the first and the last among them."""
    return list(dict.fromkeys(i * (n_rows - 1) // (_SAMPLE_ROWS - 1) for i in range(_SAMPLE_ROWS)))


def independent_copy(dataset: Any) -> Any:
    """A copy of a data set, which can be read or set to a position without disturbing other readers.

    A streaming data set holds the place of its one reader inside itself. Data sets that its methods (`take`,
    `with_format`, ...) return share this place.
    """
    # The hub file systems are shared by the whole process, which may open one of them at any moment.
    shared = getattr(dataset, "_IterableDataset__hffs_cache", None)
    return copy.deepcopy(dataset, {id(shared): shared})


def _has_shuffle_buffer(dataset: object) -> bool:
    # No public attribute tells: the state of a shuffled stream looks like any other.
    parts = [getattr(dataset, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        parts += [p for p in [getattr(part, "ex_iterable", None)] if p is not None]
        parts += list(getattr(part, "ex_iterables", []))
    return False


def pieces(content: str | Sequence[int], max_length: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where each chunk of a document begins and ends, for the chunks from `start` on."""
    while start < len(content):
        end = _end_of_chunk(content, start, max_length)
        yield start, end
        start = end


def _end_of_chunk(content: str | Sequence[int], start: int, max_length: int) -> int:
    """Where the chunk that begins at `start` ends.

    Text is cut before a blank between two words. Pre-tokenizers cut there too, so the chunks give the tokens of the
    whole document. Text without such a blank is cut after a newline, and text without a newline anywhere.
    """
    end = start + max_length
    if end >= len(content):
        return len(content)
    if not isinstance(content, str):
        return end
    lowest = start + max_length // 2
    blank = content.rfind(" ", lowest, end)
    while blank > lowest:
        if content[blank - 1].isalnum() and content[blank + 1].isalnum():
            return blank
        blank = content.rfind(" ", lowest, blank)
    newline = content.rfind("\n", lowest, end)
    return newline + 1 if newline >= 0 else end
