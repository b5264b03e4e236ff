"""Open data sets: names, files, folders and `datasets` objects all become Documents.

    one data set --open_documents--> Documents --> TokenStream
    several --open_mixture--> Documents
    Documents --save_tokenized--> a folder of token ids, which open_documents opens

Only text/ imports `datasets`.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from sae_training.demo_data import bundled_text
from sae_training.machine.paths import first_line
from sae_training.text.columns import column_types, feature_types, find_column, has_transform, is_plain, types_of_rows
from sae_training.text.documents import Documents, pieces_of
from sae_training.text.local_files import (
    LocalFiles,
    check_parquet,
    find_files,
    is_data_file,
    parquet_schema,
    place_in_parquet,
    split_names,
)
from sae_training.text.row_files import (
    check_first_rows,
    check_has_rows,
    files_of_rows,
    open_rows,
    place_in_rows,
    rows_of_files,
)
from sae_training.text.tokenize import Tokenize
from sae_training.text.values import BadRows, Given, OnBadRows, Render

_logger = logging.getLogger("sae_training")

# "rows" are read by `row_files`, the others by `datasets`.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

# Reading that much into the Arrow cache takes seconds, so a progress bar is shown.
_PROGRESS_BAR_BYTES = 100_000_000

# Fixed, because a resumed run needs the documents of a mixture in the same order.
_MIXTURE_SEED = 42

_FEATURES = {
    "text": datasets.Features({"text": datasets.Value("string")}),
    "tokens": datasets.Features({"tokens": datasets.List(datasets.Value("int64"))}),
}

# Untyped, because the overloads of load_dataset accept no variable for `streaming`.
_load_dataset: Callable[..., Any] = datasets.load_dataset


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
    place_of = None
    if files is not None:
        found, place_of = _column_of_files(files, found, split, streaming, bad_rows)
    elif not has_transform(found):
        found = found.select_columns([column])
    if isinstance(found, datasets.Dataset) and len(found) == 0:
        raise bad_rows.all_skipped() if bad_rows.n_skipped else given.empty()
    return Documents(found, bad_rows, place_of, render if kind == "chat" else None)


def open_mixture(
    paths: Sequence[object],
    weights: Sequence[float] = (),
    split: str = "train",
    text_column: str | None = None,
    streaming: bool | None = None,
    field: str = "dataset_path",
    on_bad_rows: OnBadRows = "error",
    render: Render | None = None,
    notify: Callable[[str], None] = _logger.warning,
) -> Documents:
    """Open several data sets as one: documents are drawn from the parts in turn, in a fixed random order.

    The mixture ends where the first of its parts ends. So no document comes twice, and the shares hold throughout.

    weights: how many documents come from each part, as shares of any sum; () takes equally many.
    streaming: None streams all parts if one of them is on the hub.
    The rest is as for `open_documents`.
    """
    how = {"field": field, "on_bad_rows": on_bad_rows, "render": render, "notify": notify}
    parts = [open_documents(path, split, text_column, streaming, **how) for path in paths]
    if len(parts) == 1:
        return parts[0]
    tokenized = [part.is_tokenized for part in parts]
    if any(tokenized) and not all(tokenized):
        ids, text = parts[tokenized.index(True)], parts[tokenized.index(False)]
        raise ValueError(
            f"{field}: {ids.given.name} holds token ids (column {ids.column!r}), but {text.given.name} text (column "
            f"{text.column!r}); give only one of the kinds, or set dataset_text_column to a column that both have"
        )
    column = "tokens" if tokenized[0] else "text"
    found = [_with_column(part, column) for part in parts]
    if any(part.n_rows is None for part in parts):
        found = [one.to_iterable_dataset() if isinstance(one, datasets.Dataset) else one for one in found]
    if any(one.features != found[0].features for one in found):
        # Only where needed, because a cast writes all rows of a map-style data set anew.
        features = _FEATURES[column]
        found = [one if one.features == features else one.cast(features) for one in found]
    shares = np.asarray(weights if weights else [1.0] * len(parts), dtype=np.float64)
    mixed = datasets.interleave_datasets(
        found, probabilities=(shares / shares.sum()).tolist(), seed=_MIXTURE_SEED, stopping_strategy="first_exhausted"
    )
    names = [part.given.name for part in parts]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    given = Given(field, f"the mixture of {listed}")
    bad_rows = BadRows(given, column, "ids" if tokenized[0] else "text", on_bad_rows, notify)
    bad_rows.parts = [part.bad_rows for part in parts]
    return Documents(mixed, bad_rows, ends_with=f"the first of {listed}")


def _with_column(part: Documents, column: str) -> Any:
    """The data set of a part of a mixture, with the one column `column`: text, or ids."""
    dataset = part.dataset
    if not has_transform(dataset) and dataset.features and is_plain(dataset.features[part.column]):
        return dataset if part.column == column else dataset.rename_columns({part.column: column})

    def flat(values: list[Any], rows: list[int]) -> dict[str, list[Any]]:
        # A row without a document stays a row, so that the shares of a mixture do not depend on empty rows.
        return {
            column: [
                d for value, row in zip(values, rows, strict=True) for d in part.documents_in(value, row) or [None]
            ]
        }

    is_map = isinstance(dataset, datasets.Dataset)
    options = {"load_from_cache_file": False, "desc": "reading rows"} if is_map else {"batch_size": 1}
    names = dataset.column_names or [part.column]
    flattened = dataset.map(
        lambda batch, rows: flat(batch[part.column], rows),
        batched=True,
        with_indices=True,
        remove_columns=names,
        features=_FEATURES[column],
        **options,
    )
    return flattened.with_format(None)


def save_tokenized(documents: Documents, tokenize: Tokenize, folder: Path, n_processes: int) -> int:
    """Save the token ids of each document, in order, and return the number of documents.

    `folder` becomes a save_to_disk folder with the column `tokens`.
    """

    column, dataset, max_length = documents.column, documents.dataset, documents.max_chunk_length

    def tokens_of(text: str) -> list[int]:
        return [i for ids in tokenize(list(pieces_of(text, max_length))) for i in ids]

    def tokens_of_row(value: Any, row: int) -> list[list[int]]:
        # A row without a document stays a row, so that copies have the numbers of rows that they always had.
        return [tokens_of(text) for text in documents.documents_in(value, row) or [""]]

    def tokens_of_rows(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[list[int]]]:
        found = [tokens_of_row(value, row) for value, row in zip(batch[column], rows, strict=True)]
        return {"tokens": [tokens for of_row in found for tokens in of_row]}

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    if isinstance(dataset, datasets.Dataset):
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
    else:

        def all_tokens() -> Iterator[dict[str, list[int]]]:
            for number, row in enumerate(dataset):
                yield from ({"tokens": tokens} for tokens in tokens_of_row(row.get(column), number))

        try:
            copy = datasets.Dataset.from_generator(all_tokens, features=features)
        except DatasetsError as error:
            raise documents.given.unreadable(error) from error
    copy.save_to_disk(folder)
    return len(copy)


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
    if files.builder == "parquet" and (column := _column_of_parquet(files, split, text_column, given)):
        options["columns"] = [column]
    names = {part: [glob.escape(str(file.absolute())) for file in files.splits[part]] for part in split_names(split)}
    try:
        with _progress_bars_only_if(files.n_bytes > _PROGRESS_BAR_BYTES):
            return _load_dataset(files.builder, data_files=names, split=split, streaming=streaming, **options)
    except (DatasetsError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise given.empty() from error
        raise given.unreadable(error) from error


def _column_of_parquet(files: LocalFiles, split: str, text_column: str | None, given: Given) -> str | None:
    """The column to read of parquet files, which all have it; None where rows must tell."""
    types = feature_types(datasets.Features.from_arrow_schema(parquet_schema(files, files.of(split)[0], given)))
    if "unknown" in types.values():
        return None
    column, _ = find_column(types, text_column, given)
    check_parquet(files, split, column, given)
    return column


def _column_of_files(
    files: LocalFiles, found: Any, split: str, streaming: bool, bad_rows: BadRows
) -> tuple[Any, Callable[[int], str] | None]:
    """(the one column of the files as a data set, where a row of it stands)."""
    is_whole, given = split in files.splits, bad_rows.given
    if files.are_rows:
        try:
            with _progress_bars_only_if(files.n_bytes > _PROGRESS_BAR_BYTES):
                found = open_rows(files, split, bad_rows, streaming)
            if streaming and bad_rows.on_bad_rows == "error":
                check_first_rows(files, split, bad_rows)
        except (DatasetsError, ValueError, OSError) as error:
            raise given.unreadable(error) from error
        return found, place_in_rows(files, split, bad_rows) if is_whole else None
    in_files = place_in_parquet(files, split) if files.builder == "parquet" and is_whole else None
    return found.select_columns([bad_rows.column]), in_files


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


@contextlib.contextmanager
def _progress_bars_only_if(wanted: bool) -> Iterator[None]:
    quiet = not wanted and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
