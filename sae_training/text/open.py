"""Open data sets: names, files, folders and `datasets` objects all become Documents.

    one data set --open_documents--> Documents --> TokenStream
    Documents --save_tokenized--> a folder of token ids, which open_documents opens

Only text/ imports `datasets`.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError

from sae_training.demo_data import bundled_text
from sae_training.machine.errors import first_line
from sae_training.machine.files import NotEnoughDisk, disk_named
from sae_training.machine.phases import phase, shows_bars
from sae_training.text.bars import bars_of_datasets
from sae_training.text.columns import column_types, feature_types, find_column, has_transform, types_of_rows
from sae_training.text.documents import Documents, independent_copy, pieces_of
from sae_training.text.local_files import (
    LocalFiles,
    check_parquet,
    find_files,
    is_data_file,
    parquet_schema,
    place_in_parquet,
    split_names,
)
from sae_training.text.masks import mask_columns, unread_masks
from sae_training.text.pretokenized import INFO_FILE
from sae_training.text.row_files import (
    FileOfRows,
    check_first_rows,
    check_has_rows,
    files_of_rows,
    open_rows,
    place_in_rows,
    rows_of_files,
)
from sae_training.text.row_values import BadRows, Given, OnBadRows, Render
from sae_training.text.tokenize import Tokenize

_logger = logging.getLogger("sae_training")

# "rows" are read by `row_files`, the others by `datasets`.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

# Reading that much into the Arrow cache takes seconds, so a progress bar is shown where there is a terminal.
_PROGRESS_BAR_BYTES = 100_000_000


def _load_dataset(*words: Any, **options: Any) -> Any:
    with _disk_named():
        return datasets.load_dataset(*words, **options)


def _disk_named() -> contextlib.AbstractContextManager[None]:
    """Name the disk that is full: `datasets` writes a copy of what it reads, or makes, to its cache."""
    return disk_named(Path(datasets_config.HF_DATASETS_CACHE), Path(tempfile.gettempdir()))


@bars_of_datasets()
def open_documents(
    dataset: object,
    split: str = "train",
    text_column: str | None = None,
    streaming: bool | None = None,
    field: str = "dataset_path",
    on_bad_rows: OnBadRows = "error",
    render: Render | None = None,
    notify: Callable[[str], None] = _logger.warning,
) -> Documents:
    """Open one data set: a `datasets` object, a local file or folder, a bundled name or a name on the hub.

    dataset: one of
        a `datasets` object (of a dict of splits, `split` chooses one);
        a .txt (one document), .jsonl, .json, .csv, .tsv, .parquet or .arrow file, also gzipped;
        a folder of such files, all of one kind, searched in depth and read in sorted order. Files named like
        train-00000-of-00002.parquet are parts of that split, all others are "train";
        a save_to_disk folder;
        "demo" or "demo-held-out";
        "owner/name" or "owner/name:config" on the hub.
    text_column: None looks for integer lists in tokens or input_ids, then for strings (or lists of strings, each a
        document) in text or content, then for conversations in messages, conversations or conversation, then for a
        single column of strings.
    streaming: None streams from the hub, and reads local files through the Arrow cache.
    field: the config field that error messages name.
    on_bad_rows: "error" raises BadData at a row of another type than its column's, "skip" leaves the row out.
    render: writes a conversation as text (`chat.renderer`).
    notify: told of skipped rows.

    Raises FileNotFoundError for data that is not there, and ValueError for data that cannot be used.
    """
    is_object = not isinstance(dataset, str | Path)
    given = Given(field, f"the {type(dataset).__name__} passed in" if is_object else repr(str(dataset)))
    source, streaming = _find(dataset, split, streaming, given)
    files = source if isinstance(source, LocalFiles) else None
    found: Any = None
    if files is not None and files.are_rows:
        types = types_of_rows(rows_of_files(files_of_rows(files, split)))
        if not types:
            check_has_rows(files_of_rows(files, split), given)
    else:
        found = source if files is None else _load_files(files, given, split, text_column, streaming)
        found = _one_of(found, split, streaming, given)
        found = found if has_transform(found) else found.with_format(None)
        types = column_types(found, given)
    column, kind = find_column(types, text_column, given)
    if kind == "chat" and render is None:
        raise given.without_template(column)
    bad_rows = BadRows(given, column, kind, on_bad_rows, notify)
    masks, place_of = (), None
    if files is not None and files.are_rows:
        if kind == "ids":
            masks = _masks_of_rows(files_of_rows(files, split), column, given)
        found, place_of = _documents_of_rows(files, split, streaming, bad_rows, masks)
    else:
        if kind == "ids":
            masks = _masks_of(found, files, split, column, given)
        found = _with_columns(found, [column, *masks])
        if files is not None and files.builder == "parquet" and split in files.splits:
            place_of = place_in_parquet(files, split)
    if isinstance(found, datasets.Dataset) and len(found) == 0:
        raise bad_rows.all_skipped() if bad_rows.n_skipped else given.empty()
    are_whole = not is_object and (Path(str(dataset)).expanduser() / INFO_FILE).is_file()
    return Documents(found, bad_rows, place_of, render if kind == "chat" else None, masks=masks, are_whole=are_whole)


@bars_of_datasets()
def save_tokenized(documents: Documents, tokenize: Tokenize, folder: Path, n_processes: int) -> tuple[int, int]:
    """Save the token ids of each document, in order, and return (number of documents, of bad rows that were skipped).

    `folder` becomes a save_to_disk folder with the column `tokens`.
    """
    column, dataset, max_length, bad_rows = (
        documents.column,
        documents.dataset,
        documents.max_chunk_length,
        documents.bad_rows,
    )

    def tokens_of(text: str) -> list[int]:
        return [i for ids in tokenize(list(pieces_of(text, max_length))) for i in ids]

    def tokens_of_row(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        n_before = bad_rows.n_skipped
        found = documents.documents_in(row, number)
        is_skipped = bad_rows.n_skipped > n_before
        # A row without a document stays a row, so that copies have the numbers of rows that they always had.
        return [{"tokens": tokens_of(text), "is_skipped": is_skipped} for text in found or [""]]

    def tokens_of_rows(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = zip(batch[column], numbers, strict=True)
        found = [document for value, n in rows for document in tokens_of_row({column: value}, n)]
        return {name: [document[name] for document in found] for name in features}

    # Processes that `map` starts count skipped rows each for itself, so that their rows tell.
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("int32")), "is_skipped": datasets.Value("bool")}
    )
    n_skipped = bad_rows.n_skipped
    if isinstance(dataset, datasets.Dataset):
        with phase("tokenizing", has_bar=shows_bars()), _disk_named():
            copy = dataset.map(
                tokens_of_rows,
                batched=True,
                batch_size=100,
                with_indices=True,
                num_proc=min(n_processes, len(dataset)),
                remove_columns=dataset.column_names,
                features=features,
                load_from_cache_file=False,
                desc="tokenizing",
            )
        n_skipped += int(np.sum(copy.with_format("numpy")["is_skipped"][:]))
    else:

        def all_tokens() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(dataset):
                yield from tokens_of_row(row, number)

        try:
            with phase("tokenizing", has_bar=shows_bars()), _disk_named():
                # A name of its own, because a copy out of the cache counts no skipped rows.
                copy = datasets.Dataset.from_generator(all_tokens, features=features, fingerprint=uuid.uuid4().hex)
        except DatasetsError as error:
            raise documents.given.unreadable(error) from error
        n_skipped = bad_rows.n_skipped
    with phase("saving", has_bar=shows_bars()), disk_named(folder):
        copy.remove_columns("is_skipped").save_to_disk(folder)
    return len(copy), n_skipped


# Finding the data -------------------------------------------------------------------------------


def _find(dataset: object, split: str, streaming: bool | None, given: Given) -> tuple[Any, bool]:
    """(a `datasets` object, or the local files that make one; whether to stream it)."""
    if isinstance(dataset, str | Path):
        path = Path(bundled_text(dataset) if isinstance(dataset, str) else dataset).expanduser()
        is_local = path.exists() and dataset != ""
        streaming = not is_local if streaming is None else streaming
        if streaming and set("[+") & set(split):
            raise ValueError(
                f"dataset_split: found {split!r}, expected the name of one split, because parts and sums of splits "
                "cannot be streamed; set streaming=False"
            )
        if not is_local:
            return _open_hub(dataset, given, split, streaming), streaming
        if path.is_dir() and (path / "dataset_dict.json").exists() | (path / "state.json").exists():
            return datasets.load_from_disk(str(path)), streaming
        files = find_files(path, given)
        if not set(split_names(split)) <= set(files.splits):
            raise _no_such_split(split, files.splits, given)
        return files, streaming
    if isinstance(
        dataset,
        datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict,
    ):
        return dataset, bool(streaming)
    raise ValueError(
        f"dataset: found {type(dataset).__name__}, expected a name, a path or a Dataset, IterableDataset or "
        "DatasetDict; make a list of texts one with datasets.Dataset.from_dict({'text': [...]})"
    )


def _load_files(files: LocalFiles, given: Given, split: str, text_column: str | None, streaming: bool) -> Any:
    """What `datasets` makes of the files, text documents whole."""
    options: dict[str, Any] = {"sample_by": "document"} if files.builder == "text" else {}
    if files.builder == "parquet" and (columns := _columns_of_parquet(files, split, text_column, given)):
        options["columns"] = columns
    names = {part: [glob.escape(str(file.absolute())) for file in files.splits[part]] for part in split_names(split)}
    try:
        with bars_of_datasets(files.n_bytes > _PROGRESS_BAR_BYTES):
            return _load_dataset(files.builder, data_files=names, split=split, streaming=streaming, **options)
    except (DatasetsError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise given.empty() from error
        raise given.unreadable(error) from error


def _columns_of_parquet(files: LocalFiles, split: str, text_column: str | None, given: Given) -> list[str] | None:
    """The columns to read of parquet files, the first of which all have; None where rows must tell."""
    features = datasets.Features.from_arrow_schema(parquet_schema(files, files.of(split)[0], given))
    types = feature_types(features)
    if "unknown" in types.values():
        return None
    column, kind = find_column(types, text_column, given)
    check_parquet(files, split, column, given)
    return [column, *(mask_columns(features, ()) if kind == "ids" else ())]


def _documents_of_rows(
    files: LocalFiles, split: str, streaming: bool, bad_rows: BadRows, masks: tuple[str, ...]
) -> tuple[Any, Callable[[int], str] | None]:
    """(the documents of files that are read row by row as a data set, where a row of it stands)."""
    try:
        with bars_of_datasets(files.n_bytes > _PROGRESS_BAR_BYTES):
            found = open_rows(files, split, bad_rows, streaming, masks)
        if streaming and bad_rows.on_bad_rows == "error":
            check_first_rows(files, split, bad_rows, masks)
    except (DatasetsError, ValueError, OSError) as error:
        raise bad_rows.given.unreadable(error) from error
    return found, place_in_rows(files, split, bad_rows, masks) if split in files.splits else None


def _masks_of_rows(files: list[FileOfRows], column: str, given: Given) -> tuple[str, ...]:
    """The mask columns of files that are read row by row. Warns of what may be others."""
    _warn_of_masks(unread_masks(None, rows_of_files(files), column), given)
    return mask_columns(None, rows_of_files(files))


def _masks_of(found: Any, files: LocalFiles | None, split: str, column: str, given: Given) -> tuple[str, ...]:
    """The mask columns of a data set of token ids. Warns of what may be others."""
    features = None if has_transform(found) else found.features
    if files is not None and files.builder == "parquet":  # of which `found` has the columns that are read
        with pyarrow.parquet.ParquetFile(files.of(split)[0]) as file:
            all_features = datasets.Features.from_arrow_schema(file.schema_arrow)
            rows = (row for some in file.iter_batches(100) for row in some.to_pylist())
            unread = unread_masks(all_features, rows, column)
    else:
        unread = unread_masks(features, independent_copy(found), column)
    _warn_of_masks(unread, given)
    return mask_columns(features, independent_copy(found) if features is None else ())


def _warn_of_masks(names: list[str], given: Given) -> None:
    if names:
        listed = " and ".join(map(repr, names))
        warnings.warn(
            f"{given.field}: {given.name} has a 0 or 1 for each id in column {listed}, which is not read, so that all "
            "ids count; if it masks ids, name it attention_mask (1 where an id counts), or else remove it",
            stacklevel=4,
        )


def _with_columns(found: Any, columns: list[str]) -> Any:
    """The data set with these columns alone, as far as it can be cut down."""
    if has_transform(found):
        return found
    if found.features is None and len(columns) > 1:
        return found  # rows without features may lack some of the masks, for which select_columns raises KeyError
    return found.select_columns(list(dict.fromkeys(columns)))


def _one_of(found: Any, split: str, streaming: bool, given: Given) -> Any:
    """The data set of the split, as a stream if asked for."""
    if isinstance(found, Mapping):
        if split not in found:
            raise _no_such_split(split, found, given)
        found = found[split]
    if isinstance(found, datasets.Dataset) and len(found) == 0:
        raise given.empty()
    # A stream of a data set with a transform would leave the transform out.
    is_streamed = streaming and isinstance(found, datasets.Dataset) and not has_transform(found)
    return found.to_iterable_dataset() if is_streamed else found


def _open_hub(dataset: str | Path, given: Given, split: str, streaming: bool) -> Any:
    hub_name, path = str(dataset), Path(dataset).expanduser()
    is_hub_name = _HUB_NAME.fullmatch(hub_name) and not hub_name.startswith(".")
    not_local = f"{given.field}: {given.name} is neither a local path (looked for {str(path.absolute())!r}) nor"
    if not is_hub_name or is_data_file(path):
        folder = path.absolute().parent
        hint = _near_names(path) if folder.exists() else f"; the folder {str(folder)!r} does not exist"
        raise FileNotFoundError(f"{not_local} a name that a data set on the hub can have (owner/name){hint}")
    repository, _, config = hub_name.partition(":")
    try:
        return _load_dataset(repository, config or None, split=split, streaming=streaming)
    except (ValueError, RuntimeError) as error:
        if "split" in str(error).lower():
            raise ValueError(f"dataset_split: {given.name} has no split {split!r}: {error}") from error
        raise ValueError(
            f"{given.field}: {given.name} on the hub could not be opened: {error}; a config is chosen as "
            "'owner/name:config'"
        ) from error
    except NotEnoughDisk:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{not_local} reachable on the Hugging Face hub ({first_line(error)}); without a network, give "
            f"a local file or folder, or 'demo'{_near_names(path)}"
        ) from error


def _near_names(path: Path) -> str:
    try:
        siblings = [file.name for file in path.absolute().parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, siblings, n=3) if path.name else []
    listed = " or ".join(repr(str(path.with_name(sibling))) for sibling in near)
    return f"; did you mean {listed}?" if near else ""


def _no_such_split(split: str, splits: Iterable[Any], given: Given) -> ValueError:
    return ValueError(f"dataset_split: {given.name} has no split {split!r}; it has: {', '.join(map(str, splits))}")
