"""Find the local files of a data set: of which kind they are, and which split each belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet

from sae_training.text.row_values import BadData, Given

_BUILDER_OF_SUFFIX = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}

_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_HUB_SHARD_NAME = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")

# Arrow counts the bytes of a string with 32 bits.
_MAX_TEXT_FILE_BYTES = 2**31 - 1


class LocalFiles(NamedTuple):
    """Files of one kind."""

    builder: str
    """The reader of `datasets` for the kind; "json" and "csv" are read row by row instead (`row_files`)."""
    root: Path
    """The file, or the folder they are in."""
    splits: dict[str, list[Path]]
    n_bytes: int

    @property
    def are_rows(self) -> bool:
        return self.builder in ("json", "csv")

    def name_of(self, file: Path) -> str:
        """The file as messages name it."""
        return file.name if file == self.root else str(file.relative_to(self.root))

    def of(self, split: str) -> list[Path]:
        """The files that a split, or a sum of parts of splits, is made of."""
        return [file for name in split_names(split) for file in self.splits[name]]


def split_names(split: str) -> list[str]:
    """The splits in a split such as train[:10%]+test."""
    return list(dict.fromkeys(part.split("[")[0].strip() for part in split.split("+")))


def find_files(path: Path, given: Given) -> LocalFiles:
    """The data file `path`, or those in the folder `path`.

    Raises ValueError for files that are empty, of several kinds or of an unknown one.
    """
    files = _data_files(path, given)
    builder = _BUILDER_OF_SUFFIX[data_suffix(files[0])]
    n_bytes = {file: file.stat().st_size for file in files}
    total = sum(n_bytes.values())
    if total == 0:
        raise ValueError(f"{given.field}: {given.name} is empty (0 bytes), expected text; give another")
    largest = max(files, key=lambda file: n_bytes[file])
    if builder == "text" and n_bytes[largest] > _MAX_TEXT_FILE_BYTES:
        raise ValueError(
            f"{given.field}: {largest} has {n_bytes[largest]} bytes, but a document can have "
            f"at most {_MAX_TEXT_FILE_BYTES}; split it into several .txt files"
        )
    return LocalFiles(builder, path, _splits_of_files(files), total)


def _data_files(path: Path, given: Given) -> list[Path]:
    """The file itself, or all data files of a folder, sorted. Raises ValueError unless they are of one known kind."""
    known = "/".join(_BUILDER_OF_SUFFIX)
    if path.is_file():
        if data_suffix(path) not in _BUILDER_OF_SUFFIX:
            raise ValueError(
                f"{given.field}: {given.name} is a {path.suffix or 'suffixless'} file, expected {known}; "
                "convert it, or open it with datasets.load_dataset and pass the object"
            )
        return [path]
    inside = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name not in _METADATA_FILES
    ]
    files = [file for file in inside if data_suffix(file) in _BUILDER_OF_SUFFIX]
    if not files:
        found = ", ".join(sorted({file.name for file in inside})[:8]) or "nothing"
        raise ValueError(
            f"{given.field}: folder {given.name} holds no {known} file; found: {found}; give a folder that does"
        )
    counts = Counter(_BUILDER_OF_SUFFIX[data_suffix(file)] for file in files)
    if len(counts) > 1:
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        raise ValueError(
            f"{given.field}: folder {given.name} mixes kinds of files ({found}), expected one kind; "
            "name one file, or put the kinds into separate folders"
        )
    return files


def is_data_file(path: Path) -> bool:
    return data_suffix(path) in _BUILDER_OF_SUFFIX


def data_suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _splits_of_files(files: list[Path]) -> dict[str, list[Path]]:
    shards = [_HUB_SHARD_NAME.match(file.name) for file in files]
    splits: dict[str, list[Path]] = {}
    for file, shard in zip(files, shards, strict=True):
        splits.setdefault(shard["split"] if shard and all(shards) else "train", []).append(file)
    return splits


def place_in_parquet(files: LocalFiles, split: str) -> Callable[[int], str]:
    """A function from the number of a row of a split to its file and its row there, for messages."""

    def place(row: int) -> str:
        left = row
        for file in files.of(split):
            n = pyarrow.parquet.read_metadata(file).num_rows
            if left < n:
                return f"{files.name_of(file)}, row {left + 1:,}"
            left -= n
        return f"row {row + 1:,}"

    return place


def parquet_schema(files: LocalFiles, file: Path, given: Given) -> pyarrow.Schema:
    """The columns of a parquet file. Raises BadData for a file that is none."""
    try:
        return pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise given.unreadable(error, files.name_of(file)) from error


def check_parquet(files: LocalFiles, split: str, column: str, given: Given) -> None:
    """Raise BadData if a file has another type in the column than the first: `datasets` would make text of numbers."""
    first = ""
    for file in files.of(split):
        schema = parquet_schema(files, file, given)
        if column not in schema.names:
            raise BadData(
                f"{given.field}: {given.name}: {files.name_of(file)} has no column {column!r}; it has: "
                f"{', '.join(schema.names)}; write the file anew, or leave it out"
            )
        found = str(schema.field(column).type).replace("large_", "")
        first = first or found
        if found not in (first, "null"):
            raise BadData(
                f"{given.field}: {given.name}: {files.name_of(file)} holds {found} values in column {column!r}, "
                f"expected {first} as in the files before it; write the file anew, or leave it out"
            )
