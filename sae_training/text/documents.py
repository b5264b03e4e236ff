"""Read the documents of a data set in order, from any saved position.

open_documents --> Documents --read(position)--> Chunk, Chunk, ... --> TokenStream
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from sae_training.text.masks import MaskMisfit, counting_ids
from sae_training.text.row_values import BadRows, Kind, Render, UnknownId, WrongValue, check_known, documents_in
from sae_training.text.tokenize import Piece

# A JSON-safe place in a data set. Only Documents knows what the keys mean.
Position = dict[str, Any]

# Characters or token ids. Longer documents are read in pieces, so that memory and saved states stay small.
MAX_CHUNK_LENGTH = 1_000_000

# How much of the text around a piece is tokenised with it. Tokens depend on their word, and perhaps on its neighbours.
_CHARACTERS_AROUND = 10_000
_TWO_WORDS = re.compile(r"\w\s+\w")

# A fingerprint reads this many rows, and characters or ids at this many places of each row.
_SAMPLE_ROWS, _SAMPLE_PLACES = 64, 16


class Chunk(NamedTuple):
    """A document, or a piece of a document that is longer than MAX_CHUNK_LENGTH."""

    content: str | Sequence[int]
    starts_document: bool
    next_position: Position


class Documents:
    """The documents of one data set in a fixed order, readable from any saved position.

    A map-style data set is positioned by its row index, a streamed one by the state that `datasets` gives. That state
    lacks the content of a shuffle buffer. Rows behind a shuffle buffer are therefore read again from the start, which
    is exact if the shuffle has a seed.

    A row is a document, or several: a list of strings. A row of the wrong type goes to `bad_rows`.

    place_of: tells, for messages, where row number n stands, such as a file and a line; None says "row n".
    render: writes a conversation as text; needed for the kind "chat".
    ends_with: what has run out where the documents end, if that is not all of `given`.
    masks: columns that say which token ids count (`masks`); the others are dropped.
    are_whole: rows are known to be whole documents, and no pieces of a running text.
    parts: those of a mixture.
    """

    def __init__(
        self,
        dataset: Any,
        bad_rows: BadRows,
        place_of: Callable[[int], str] | None = None,
        render: Render | None = None,
        ends_with: str | None = None,
        max_chunk_length: int = MAX_CHUNK_LENGTH,
        masks: tuple[str, ...] = (),
        are_whole: bool = False,
        parts: tuple[Documents, ...] = (),
    ) -> None:
        self.dataset = dataset
        self.bad_rows = bad_rows
        self.column, self.given = bad_rows.column, bad_rows.given
        self.kind: Kind = bad_rows.kind
        self.is_tokenized = self.kind == "ids"
        self.place_of = place_of or (lambda row: f"row {row + 1:,}")
        self.render = render
        self.ends_with = ends_with or self.given.name
        self.max_chunk_length = max_chunk_length
        self.masks = masks
        self.are_whole = are_whole
        self.vocab_size: int | None = None
        self.parts = parts
        # Only a map-style data set has a length.
        self.n_rows: int | None = len(dataset) if hasattr(dataset, "__len__") else None
        if self.n_rows is not None:
            self._kind = "rows"
        else:
            self._kind = "replayed stream" if _has_shuffle_buffer(dataset) else "stream"

    def with_masks(self, masks: tuple[str, ...]) -> Documents:
        """The same documents under other masks."""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)  # it depends on the masks
        other.masks = masks
        return other

    def with_vocabulary(self, vocab_size: int | None) -> Documents:
        """The same documents, where a row with an id from `vocab_size` on is a bad row."""
        other = copy.copy(self)
        other.vocab_size = vocab_size
        return other

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

    def content_of(self, row: Mapping[str, Any]) -> Any:
        """The value of a row's column, good or bad, without masked ids where the masks fit."""
        value = row.get(self.column)
        try:
            return counting_ids(row, self.column, self.masks)
        except (MaskMisfit, TypeError):  # a TypeError where the value is no list
            return value

    def sample(self) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """(row, whether it is the last) of evenly spaced rows, or of the first of a stream.

        It ends at a row that cannot be read: whoever comes to that row raises its error.
        """
        if self.n_rows is not None:
            rows = ((self.dataset[row], row == self.n_rows - 1) for row in _spaced(self.n_rows))
        else:
            end: Any = None
            pairs = itertools.pairwise(itertools.chain(independent_copy(self.dataset), [end]))
            rows = ((row, following is end) for row, following in itertools.islice(pairs, _SAMPLE_ROWS))
        with contextlib.suppress(Exception):
            yield from rows

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A hash of 64 evenly spaced documents, which tells a text from another version of it; None for a stream."""
        if self.n_rows is None:
            return None
        digest = hashlib.sha256()
        for row in _spaced(self.n_rows):
            content = self.content_of(self.dataset[row])
            if content is None:
                content = ()
            elif isinstance(content, dict) or not hasattr(content, "__len__"):
                content = repr(content)
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
        first, offset = position.get("item", 0), position["offset"]
        for row, here, after in rows:
            documents = self.documents_in(row, here["row"])
            for item in range(first, len(documents)):
                content = documents[item]
                this = here | {"item": item} if item > 0 else here
                following = here | {"item": item + 1} if item + 1 < len(documents) else after
                for start, end in pieces(content, self.max_chunk_length, offset):
                    next_position = following if end == len(content) else this | {"offset": end}
                    yield Chunk(_piece(content, start, end), start == 0, next_position)
                offset = 0
            first = offset = 0

    def documents_in(self, row: Mapping[str, Any], number: int) -> list[Any]:
        """The documents of row `number`, text or ids; none of a bad row that is skipped. Raises BadData for others."""
        place = functools.partial(self.place_of, number)
        if self.column not in row:
            self.bad_rows.meet_missing(place, row, number)
            return []
        try:
            found = documents_in(row[self.column], self.kind)
            if self.masks and found:
                found = [counting_ids({**row, self.column: found[0]}, self.column, self.masks)]
            if self.is_tokenized and found:
                check_known(found[0], self.column, self.vocab_size)
            return found if self.render is None else [self.render(conversation) for conversation in found]
        except WrongValue as error:
            self.bad_rows.meet_value(place, error, number)
        except (MaskMisfit, UnknownId) as error:
            self.bad_rows.meet(place, str(error), number)
        return []

    def _fail(self, error: Exception, row: int, note: str = "") -> NoReturn:
        """Raise the error for a row that could not be read. Those of disks and networks stay what they are."""
        place = f"row {row + 1:,}"
        failure = error if isinstance(error, OSError) else self.given.unreadable(error, place)
        if isinstance(error, OSError):
            note = f"{self.given.field}: {self.given.name} could not be read at {place}"
        if note:
            failure.add_note(note)
        raise failure from (None if failure is error else error)

    def _rows(self, position: Position) -> Iterator[tuple[Mapping[str, Any], Position, Position]]:
        """(row, position of the row, position of the next row) for each row of a map-style data set."""
        here = _at_row(position)
        for row in range(position["row"], self.n_rows or 0):
            after = here | {"row": row + 1}
            try:
                found = self.dataset[row]
            except Exception as error:  # whatever reads the rows: a library, a disk, or code of the user
                self._fail(error, row)
            yield found, here, after
            here = after

    def _stream(self, position: Position) -> Iterator[tuple[Mapping[str, Any], Position, Position]]:
        """(row, position of the row, position of the next row) for each row of a streamed data set."""
        stream = independent_copy(self.dataset)
        n_to_pass = position["row"]
        # Earlier versions streamed some kinds of files by other means. Their rows are passed by number.
        if self._kind == "stream" and n_to_pass > 0 and _readers(position["stream"]) == _readers(stream.state_dict()):
            stream.load_state_dict(copy.deepcopy(position["stream"]))
            n_to_pass = 0
        examples = itertools.islice(iter(stream), n_to_pass, None)
        here = _at_row(position)
        for row in itertools.count(position["row"]):
            try:
                example = next(examples, None)
            except Exception as error:  # whatever reads the rows: a library, a disk, a network, or code of the user
                is_misplaced = isinstance(error, KeyError | IndexError) and row == position["row"] and row > 0
                note = f"the saved position does not fit {self.given.name}: has it changed?" if is_misplaced else ""
                self._fail(error, row, note)
            if example is None:
                return
            after = here | {"row": row + 1}
            if self._kind == "stream":
                after["stream"] = stream.state_dict()
            yield example, here, after
            here = after


def _spaced(n_rows: int) -> list[int]:
    """Up to _SAMPLE_ROWS numbers of rows, evenly spaced, the first and the last among them."""
    return list(dict.fromkeys(i * (n_rows - 1) // (_SAMPLE_ROWS - 1) for i in range(_SAMPLE_ROWS)))


def _at_row(position: Position) -> Position:
    """The position of the beginning of its row."""
    return {key: value for key, value in position.items() if key != "item"} | {"offset": 0}


def _readers(state: Any) -> list[Any]:
    """The types of the readers in the state of a stream, which tell whether another stream can go on from it."""
    if isinstance(state, list):
        return [_readers(part) for part in state]
    if not isinstance(state, dict):
        return []
    # A reader that cuts batches anew keeps the state of its source at an earlier row too.
    inside = [_readers(part) for key, part in sorted(state.items()) if not key.startswith("previous")]
    return [state.get("type"), *[readers for readers in inside if readers]]


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


def pieces_of(content: str, max_length: int) -> Iterator[str]:
    """The chunks of one document, in order."""
    return (_piece(content, start, end) for start, end in pieces(content, max_length))


def _piece(content: Any, start: int, end: int) -> Any:
    """A chunk of a document: a `Piece` of a text, so that its ids can be those of the whole text."""
    if not isinstance(content, str) or (start == 0 and end == len(content)):
        return content[start:end]
    return Piece(content[start:end], _around(content, start, -1), _around(content, end, 1))


def _around(content: str, place: int, direction: int) -> str:
    """The text before (-1) or after (1) a place, so far that it holds two words: no token depends on what is beyond."""
    n = _CHARACTERS_AROUND
    while True:
        found = content[max(0, place - n) : place] if direction < 0 else content[place : place + n]
        if len(found) < n or n >= MAX_CHUNK_LENGTH or _TWO_WORDS.search(found):
            return found
        n *= 2


def pieces(content: str | Sequence[int], max_length: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where each chunk of a document begins and ends, for the chunks from `start` on."""
    while start < len(content):
        end = _end_of_chunk(content, start, max_length)
        yield start, end
        start = end


def _end_of_chunk(content: str | Sequence[int], start: int, max_length: int) -> int:
    """Where the chunk that begins at `start` ends.

    Text is cut before a blank between two words, where tokens begin too. Text without such a blank is cut after a
    newline, and text without a newline anywhere.
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
