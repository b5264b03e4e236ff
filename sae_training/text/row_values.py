"""Say what a row of a data set may hold, and what becomes of a row that holds something else.

    value of a row --documents_in--> its documents: strings, lists of token ids, or conversations
                  \\--anything else--> BadRows: an error that names the row, or a row that is skipped and counted

Every row is checked when it is read, because the types of a column are known from its first rows only.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sae_training.machine.errors import first_line

Kind = Literal["text", "ids", "chat"]

OnBadRows = Literal["error", "skip"]

Render = Callable[[Any], str]
"""Writes one conversation as text, by the chat template of a tokenizer. Raises ValueError if the template refuses."""

EXPECTED = {
    "text": "a string or a list of strings",
    "ids": "a list of token ids (integers)",
    "chat": "a list of messages, each with a role and a content",
}

# The names that messages go by: those of OpenAI and Hugging Face, and those of ShareGPT.
_ROLE_AND_CONTENT = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class BadData(ValueError):
    """The data cannot be read on. What was read before is good."""


class WrongValue(Exception):
    """The value of a row is none of its column's kind. The text of the error says what was found."""


class UnknownId(Exception):
    """A row holds an id that no token of the model has. The text of the error says which."""


Place = str | Callable[[], str]
"""Where a row stands, or a function that finds it: rows of a file are counted from its start."""


class Given(NamedTuple):
    """A data set as messages name it: the config field, and the value of that field."""

    field: str
    name: str

    def empty(self) -> ValueError:
        return ValueError(f"{self.field}: {self.name} is empty (0 rows), expected text; give another")

    def without_template(self, column: str) -> ValueError:
        return ValueError(
            f"{self.field}: {self.name} holds conversations (column {column!r}), but the tokenizer has no chat "
            "template, so that nothing says how to write them as text; use a model whose tokenizer has one "
            "(often called -Chat or -Instruct), or set dataset_text_column to a column of text"
        )

    def unreadable(self, error: BaseException, place: str = "") -> BadData:
        """The error to raise, or the one that was raised for a row within a library."""
        cause = error
        while cause.__cause__ is not None and not isinstance(cause, BadData):
            cause = cause.__cause__
        if isinstance(cause, BadData):
            return cause
        where = f" at {place}" if place else ""
        advice = "check the data, or open it with datasets.load_dataset and pass the object"
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            advice = (
                "if that is where Hugging Face keeps its files (~/.cache/huggingface), set HF_HOME to a folder you may "
                "write to"
            )
        if isinstance(cause, UnicodeDecodeError):
            advice = "save the text as UTF-8 (iconv -f utf-16 -t utf-8, for instance)"
        what = f"({type(cause).__name__}: {first_line(cause)})"
        return BadData(f"{self.field}: {self.name} could not be read{where} {what}; {advice}")


class BadRows:
    """What is done about rows of the wrong type: an error, or a count of those that were skipped.

    column: named in messages, with what it is expected to hold.
    notify: told of the first skipped row, and whenever their number has grown tenfold.
    """

    def __init__(
        self, given: Given, column: str, kind: Kind, on_bad_rows: OnBadRows, notify: Callable[[str], None]
    ) -> None:
        self.given, self.column, self.notify = given, column, notify
        self.kind: Kind = kind
        self.on_bad_rows: OnBadRows = on_bad_rows
        self._places: set[int] = set()
        """Hashes of the places of skipped rows, because rows are read again: ahead, for evaluation, in later epochs."""

        self._last: tuple[Place, str] = ("", "")
        self.parts: list[BadRows] = []
        """Those of the parts of a mixture."""

    @property
    def n_skipped(self) -> int:
        """How many rows have been skipped, each counted once."""
        return len(self._places) + sum(part.n_skipped for part in self.parts)

    def say_skipped(self, n: int | None = None) -> None:
        """Say how many rows were left out, if there were any. `n`: None takes `n_skipped`."""
        if n := self.n_skipped if n is None else n:
            rows, were = ("rows", "were") if n > 1 else ("row", "was")
            self.notify(f"on_bad_rows: {n:,} bad {rows} of {self.given.name} {were} skipped.")

    def all_skipped(self) -> BadData:
        """The error for data of which nothing is left."""
        return BadData(
            f"{self.given.field}: {self.given.name}: all {self.n_skipped:,} rows were skipped, the last for this: "
            f"{_written(*self._last)}; mend the data, or set dataset_text_column to another column"
        )

    def meet_value(self, place: Place, found: object, key: object = None) -> None:
        """Do as `meet` for a row whose column holds `found`."""
        self.meet(place, f"column {self.column!r} holds {found}, expected {EXPECTED[self.kind]}", key)

    def meet_missing(self, place: Place, row: Mapping[str, Any], key: object = None) -> None:
        """Do as `meet` for a row that lacks the column. A row whose column holds null is a row without a document."""
        self.meet(place, f"has no column {self.column!r}; it has: {', '.join(map(str, row)) or 'none at all'}", key)

    def meet(self, place: Place, problem: str, key: object = None) -> None:
        """Raise BadData for a bad row, or count it.

        place: the file and the line, or else the row; or a function that finds it, called where it is said.
        key: what tells the row from others; None takes the place.
        """
        if self.on_bad_rows == "error":
            raise BadData(
                f"{self.given.field}: {self.given.name}: {_written(place, problem)}; mend the row, or set "
                "on_bad_rows=skip to leave out rows like it"
            )
        hashed = hash(place if key is None else key)
        is_new, self._last = hashed not in self._places, (place, problem)
        self._places.add(hashed)
        n = len(self._places)
        if is_new and str(n).strip("0") == "1":
            others = "" if n == 1 else f" ({n:,} rows so far)"
            self.notify(f"on_bad_rows: skipped {_written(place, problem)}{others}")

    def __deepcopy__(self, memo: dict[int, Any]) -> BadRows:
        """Itself: readers are independent copies of a data set, and all count in one place."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """What `datasets` hashes to know its cache again: not the counts."""
        return BadRows, (self.given, self.column, self.kind, self.on_bad_rows, print)


def _written(place: Place, problem: str) -> str:
    return f"{place if isinstance(place, str) else place()}: {problem}"


def documents_in(value: Any, kind: Kind) -> list[Any]:
    """The documents in the value of a row: strings, lists of ids, or lists of messages. None has none.

    Raises WrongValue for a value that is none of the kind.
    """
    if value is None:
        return []
    if kind == "chat":
        conversation = messages_in(value)
        return [conversation] if conversation else []
    if kind == "ids":
        value = value.tolist() if hasattr(value, "tolist") and not isinstance(value, np.ndarray) else value  # a tensor
        check_ids(value)
        return [value]
    if isinstance(value, str):
        check_text(value)
        return [value]
    if not isinstance(value, list | tuple | np.ndarray):
        raise WrongValue(describe(value))
    texts = [text for text in np_list(value) if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise WrongValue(describe(value))
    for text in texts:
        check_text(text)
    return texts


def check_text(text: str) -> None:
    """Raise WrongValue for a string with half a surrogate pair, which JSON can spell and no tokenizer can read."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WrongValue(f"half a surrogate pair (character {error.start}), which is no text") from None


def check_ids(value: Any) -> None:
    """Raise WrongValue unless the value is a flat list of integers."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise WrongValue(describe(value))
    if len(value) == 0:
        return
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = None
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        raise WrongValue(describe(value))
    if array is not value and any(isinstance(i, bool) for i in value):  # numpy takes [1, True] for integers
        raise WrongValue(describe(value))


def check_known(ids: Any, column: str, vocab_size: int | None) -> None:
    """Raise UnknownId, naming the column, for an id below 0, or beyond the vocabulary (None: of unknown size)."""
    array = np.asarray(ids)
    if array.size == 0:
        return
    if array.min() < 0:
        raise UnknownId(
            f"has token id {array.min()} in column {column!r}, expected none below 0; set dataset_text_column to the "
            "column of input ids, or use the text"
        )
    if vocab_size is not None and array.max() >= vocab_size:
        raise UnknownId(
            f"has, in column {column!r}, token id {array.max()}, but the model's vocabulary has {vocab_size} ids (0 "
            f"to {vocab_size - 1}); use ids made with the model's own tokenizer"
        )


def is_ids(value: Any) -> bool:
    """Whether the value is a flat list of integers."""
    try:
        return value is not None and bool(documents_in(value, "ids"))
    except WrongValue:
        return False


def messages_in(value: Any) -> list[dict[str, Any]]:
    """The messages of a conversation (a list, or JSON), with the keys role and content.

    Raises WrongValue for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise WrongValue(describe(value)) from None
    if not isinstance(value, list | tuple | np.ndarray):
        raise WrongValue(describe(value))
    return [message_in(message, number) for number, message in enumerate(np_list(value), 1)]


def message_in(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise WrongValue(f"{describe(message)} as message {number}")
    for role_name, content_name in _ROLE_AND_CONTENT:
        role, content = message.get(role_name), message.get(content_name)
        if not isinstance(role, str):
            continue
        # Arrow fills in None where other messages have a key. Templates would take it for a value.
        others = {key: x for key, x in message.items() if x is not None and key not in (role_name, content_name)}
        if content is None and others.get("tool_calls"):
            content = ""
        if isinstance(content, str | list):
            if isinstance(content, str):
                check_text(content)
            role = _ROLES.get(role, role) if role_name == "from" else role
            return {"role": role, "content": content, **others}
        raise WrongValue(f"{describe(content)} as {content_name} of message {number}")
    keys = ", ".join(map(repr, message)) or "no keys"
    raise WrongValue(f"message {number} without a role (it has {keys})")


def np_list(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def describe(value: Any) -> str:
    """The type of a value in plain words, with the value itself where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool | np.bool_):
        return f"a truth value ({bool(value)})"
    if isinstance(value, int | float | np.number):
        return f"a number ({short(value)})"
    if isinstance(value, str):
        return f"a string ({short(value)})"
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(value, dict):
        return f"a dict with {'the keys ' + short(list(value))[1:-1] if value else 'no keys'}"
    if isinstance(value, list | tuple | np.ndarray):
        kinds = dict.fromkeys(_plural(item) for item in value)
        return f"a list of {' and '.join(kinds)}" if kinds else "an empty list"
    return f"a {type(value).__name__}"


def _plural(item: Any) -> str:
    if item is None:
        return "nulls"
    if isinstance(item, bool | np.bool_):
        return "truth values"
    if isinstance(item, int | np.integer):
        return "integers"
    if isinstance(item, float | np.floating):
        return "numbers"
    if isinstance(item, dict):
        return "dicts"
    if isinstance(item, list | tuple | np.ndarray):
        return "lists"
    return {str: "strings", bytes: "bytes"}.get(type(item), f"{type(item).__name__}s")


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
