"""Read .jsonl, .json, .csv and .tsv files row by row, so that each value keeps its type and each row its place.

The readers of `datasets` guess the types of columns on the first 10 MB. From a value of another type on, they rewrite
the values of the whole column (a text becomes a quoted text, a number or a dict a string) and say nothing.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets

from sae_training.machine.errors import first_line
from sae_training.text.local_files import LocalFiles, split_names
from sae_training.text.masks import MaskMisfit, plain_masks
from sae_training.text.row_values import BadData, BadRows, Given, WrongValue, describe, documents_in, short

# Python's own limit is 131,072 characters, less than a long document.
csv.field_size_limit(2**31 - 1)

_ROWS_TO_CHECK = 100

# A byte-order mark may stand before the first line.
_BLANK = b" \t\r\n\xef\xbb\xbf"


class PlacedRow(NamedTuple):
    """A row of a file, or in its stead what is wrong with it."""

    place: str
    """The file's name and the line that the row begins on."""
    row: dict[str, Any] | None
    problem: str | None = None


class FileOfRows(NamedTuple):
    """A file, the name it has in messages, and what tells it from an earlier version of itself."""

    path: str
    name: str
    n_bytes: int
    changed_at: int


def files_of_rows(files: LocalFiles, split: str) -> list[FileOfRows]:
    stats = [(file, file.stat()) for file in files.of(split)]
    return [
        FileOfRows(str(file.absolute()), files.name_of(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats
    ]


def rows_of_files(files: Sequence[FileOfRows]) -> Iterator[dict[str, Any]]:
    """The rows of the files that are rows at all."""
    return (row for file in files for _, row, _ in rows_of_file(file) if row is not None)


def placed_documents(
    files: Sequence[FileOfRows], bad_rows: BadRows, masks: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each document in the column: a string, a list of ids, or a conversation as JSON.

    The row has the document, and beside a list of ids its masks. An empty row is a row without a document, which comes
    as None, so that rows of plain text keep their numbers.
    """
    column = bad_rows.column
    for file in files:
        for place, row, problem in rows_of_file(file):
            if row is None:
                bad_rows.meet(place, f"found {problem}, expected a row with a column {column!r}")
                continue
            if column not in row:
                bad_rows.meet_missing(place, row)
                continue
            try:
                documents = documents_in(row[column], bad_rows.kind)
                beside = plain_masks(row, column, masks) if documents else dict.fromkeys(masks)
            except WrongValue as error:
                bad_rows.meet_value(place, error)
                continue
            except MaskMisfit as error:
                bad_rows.meet(place, str(error))
                continue
            for document in documents or [None]:
                is_chat = bad_rows.kind == "chat" and document is not None
                yield place, {column: json.dumps(document) if is_chat else document, **beside}


def generate(files: Sequence[FileOfRows], bad_rows: BadRows, masks: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """What `datasets` stores of the files: a row for each document."""
    return (row for _, row in placed_documents(files, bad_rows, masks))


def open_rows(
    files: LocalFiles, split: str, bad_rows: BadRows, streaming: bool, masks: tuple[str, ...] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """The documents of the files of a split as a data set with one column, and the `masks` beside ids.

    Raises BadData for bad rows of text.
    """
    integers = datasets.List(datasets.Value("int64"))
    value = integers if bad_rows.kind == "ids" else datasets.Value("string")
    features = datasets.Features({bad_rows.column: value, **dict.fromkeys(masks, integers)})

    def options(name: str) -> dict[str, Any]:
        arguments = {"files": files_of_rows(files, name), "bad_rows": bad_rows}
        if masks:  # else left out, so that caches of earlier versions are known again
            arguments["masks"] = masks
        return {"features": features, "gen_kwargs": arguments}

    if streaming:
        return datasets.IterableDataset.from_generator(generate, **options(split))
    names = split_names(split)
    if bad_rows.on_bad_rows == "skip":  # counted here, because rows of the Arrow cache are no longer bad
        for name in names:
            for _ in placed_documents(files_of_rows(files, name), bad_rows, masks):
                pass
    whole: dict[str, Any] = {name: datasets.Dataset.from_generator(generate, **options(name)) for name in names}
    if names == [split]:
        return whole[split]
    asked = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(whole[name]) for name in names})
    return datasets.concatenate_datasets([whole[one.splitname].select(range(one.from_, one.to)) for one in asked])


def check_first_rows(files: LocalFiles, split: str, bad_rows: BadRows, masks: tuple[str, ...] = ()) -> None:
    """Raise BadData for a bad row among the first, which a stream would come to after the model has been loaded."""
    for _ in itertools.islice(placed_documents(files_of_rows(files, split), bad_rows, masks), _ROWS_TO_CHECK):
        pass


def rows_of_file(file: FileOfRows) -> Iterator[PlacedRow]:
    """The rows of one file, in order."""
    plain = file.name.removesuffix(".gz").lower()
    read = _csv_rows if plain.endswith((".csv", ".tsv")) else _json_rows
    try:
        with gzip.open(file.path) if file.name.endswith(".gz") else open(file.path, "rb") as content:
            for where, row, problem in read(content):
                yield PlacedRow(f"{file.name}, {where}", row, problem)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(f"{file.path}: is no whole gzip file ({first_line(error)}); write it anew") from error


def check_has_rows(files: Sequence[FileOfRows], given: Given) -> None:
    """Raise ValueError for files without a row, saying what stands there in its place."""
    for file in files:
        for place, row, problem in rows_of_file(file):
            if row is None:
                raise BadData(
                    f"{given.field}: {given.name}: {place}: found {problem}, expected rows with named columns "
                    "(in .jsonl one JSON object a line); write the file anew"
                )
    raise given.empty()


# What a generator of one format yields: where in the file, the row, or else what is wrong.
_Found = tuple[str, dict[str, Any] | None, str | None]


def _json_rows(file: Any) -> Iterator[_Found]:
    first = next((line for line in file if line.strip(_BLANK)), b"")
    is_whole = not any(line.strip() for line in file)
    file.seek(0)
    if is_whole or _loads(first) is None and first.strip(_BLANK)[:1] in (b"[", b"{"):
        try:
            content = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            file.seek(0)  # so it is lines after all, some of them broken
        else:
            yield from _rows_of_whole(content)
            return
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield f"line {number}", None, f"bytes that are not UTF-8 ({first_line(error)})"
        except (ValueError, RecursionError) as error:
            yield f"line {number}", None, f"broken JSON ({first_line(error)})"
        else:
            yield f"line {number}", *_row_or_problem(row)


def _row_or_problem(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    return (value, None) if isinstance(value, dict) else (None, f"{describe(value)} in place of a row")


def _loads(text: bytes) -> Any:
    """The JSON value, None for anything else."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _rows_of_whole(content: Any) -> Iterator[_Found]:
    """The rows of a file that is one JSON value: a list of rows or of strings, a dict of columns, or one row."""
    if isinstance(content, dict):
        content = _rows_of_columns(content) or [content]
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        yield f"row {number}", *_row_or_problem({"text": row} if isinstance(row, str) else row)


def _rows_of_columns(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a dict of columns, lists or (as pandas writes them) dicts by row number; none for a single row.

    A column of numbers or dicts only is rather the ids or the messages of one row.
    """
    if all(isinstance(column, dict) for column in content.values()):
        content = {name: list(column.values()) for name, column in content.items()}
    columns = list(content.values())
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        return []
    if not any(isinstance(item, str | list) for column in columns for item in column):
        return []
    return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]


def _csv_rows(file: Any) -> Iterator[_Found]:
    header_line = next(iter(file), b"")
    file.seek(0)
    delimiter = max(",\t;|", key=lambda one: header_line.count(one.encode()))  # spreadsheets differ by country
    # Bytes that are not UTF-8 become surrogates, so that only their row is bad.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    header, last_line = next(reader, None), reader.line_num
    for fields in reader:
        where, last_line = f"line {last_line + 1}", reader.line_num
        if not fields or header is None:
            continue
        if len(fields) != len(header):
            yield where, None, f"{len(fields)} field(s) {short(fields)} under {len(header)} column name(s)"
        else:
            yield where, dict(zip(header, fields, strict=True)), None


def place_in_rows(
    files: LocalFiles, split: str, bad_rows: BadRows, masks: tuple[str, ...] = ()
) -> Callable[[int], str]:
    """A function from the number of a row that `generate` made of a split to its file and line, for messages."""

    def place(row: int) -> str:
        documents = placed_documents(files_of_rows(files, split), bad_rows, masks)
        found = next(itertools.islice(documents, row, None), None)
        return f"row {row + 1:,}" if found is None else found[0]

    return place
