"""Open data sets: names, files, folders and `datasets` objects all become Documents.

    one data set --open_documents--> Documents --> TokenStream
    several --open_mixture--> Documents
    Documents --save_tokenized--> a folder of token ids, which open_documents opens

Only text/ imports `datasets`.
"""

from __future__ import annotations

import contextlib
import glob
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError

from sae_training.demo_data import bundled_text
from sae_training.machine.files import NotEnoughDisk, disk_named
from sae_training.machine.paths import first_line
from sae_training.text.columns import find_column, has_transform
from sae_training.text.documents import Documents, Given, independent_copy, pieces
from sae_training.text.masks import MASKS, mask_columns
from sae_training.text.pretokenized import INFO_FILE
from sae_training.text.tokenize import Tokenize

_BUILDER_OF_SUFFIX = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_HUB_SHARD_NAME = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

# Reading that much into the Arrow cache takes seconds, so a progress bar is shown.
_PROGRESS_BAR_BYTES = 100_000_000

# Arrow counts the bytes of a string with 32 bits.
_MAX_TEXT_FILE_BYTES = 2**31 - 1

# Fixed, because a resumed run needs the documents of a mixture in the same order.
_MIXTURE_SEED = 42

_INTEGERS = datasets.List(datasets.Value("int64"))

_FEATURES = {
    "text": datasets.Features({"text": datasets.Value("string")}),
    "tokens": datasets.Features({"tokens": _INTEGERS}),
}


def _load_dataset(*words: Any, **options: Any) -> Any:
    with _disk_named():
        return datasets.load_dataset(*words, **options)


def _disk_named() -> contextlib.AbstractContextManager[None]:
    """Name the disk that is full: `datasets` writes a copy of what it reads, or makes, to its cache."""
    return disk_named(Path(datasets_config.HF_DATASETS_CACHE), Path(tempfile.gettempdir()))


def open_documents(
    dataset: object,
    split: str = "train",
    text_column: str | None = None,
    streaming: bool | None = None,
    field: str = "dataset_path",
) -> Documents:
    """Open one data set: a `datasets` object, a local file or folder, a bundled name or a name on the hub.

    dataset: one of
        a `datasets` object (of a dict of splits, `split` chooses one);
        a .txt (one document), .jsonl, .json or .parquet file, also gzipped;
        a folder of such files, all of one kind, searched in depth and read in sorted order. Files named like
        train-00000-of-00002.parquet are parts of that split, all others are "train";
        a save_to_disk folder;
        "demo" or "demo-held-out";
        "owner/name" or "owner/name:config" on the hub.
    text_column: None looks for integer lists in tokens or input_ids, then for strings in text or content, then for a
        single column of strings.
    streaming: None streams from the hub, and reads local files through the Arrow cache.
    field: the config field that error messages name.

    Raises FileNotFoundError for data that is not there, and ValueError for data that cannot be used.
    """
    if isinstance(dataset, str | Path):
        given = Given(field, repr(str(dataset)))
        path = Path(bundled_text(dataset) if isinstance(dataset, str) else dataset).expanduser()
        is_local = path.exists() and dataset != ""
        streaming = not is_local if streaming is None else streaming
        if streaming and set("[+") & set(split):
            raise ValueError(
                f"dataset_split: found {split!r}, expected the name of one split, because parts and sums of splits "
                "cannot be streamed; set streaming=False"
            )
        found = _open_local(path, given, split, streaming) if is_local else _open_hub(dataset, given, split, streaming)
    elif isinstance(
        dataset,
        datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict,
    ):
        found, given = dataset, Given(field, f"the {type(dataset).__name__} passed in")
    else:
        raise ValueError(
            f"dataset: found {type(dataset).__name__}, expected a name, a path or a Dataset, IterableDataset or "
            "DatasetDict; make a list of texts one with datasets.Dataset.from_dict({'text': [...]})"
        )
    if isinstance(found, Mapping):
        if split not in found:
            raise _no_such_split(split, found, given)
        found = found[split]
    if isinstance(found, datasets.Dataset) and len(found) == 0:
        raise given.empty()
    if streaming and isinstance(found, datasets.Dataset):
        found = found.to_iterable_dataset()
    is_transformed = has_transform(found)
    found = found if is_transformed else found.with_format(None)
    column, is_tokenized = find_column(found, text_column, given)
    features = None if is_transformed else found.features
    rows = independent_copy(found) if is_tokenized and features is None else ()
    masks = mask_columns(features, rows) if is_tokenized else ()
    if not is_transformed and (features is not None or not masks):
        # Rows of a stream without features may lack some of the masks, for which select_columns raises KeyError.
        found = found.select_columns(list(dict.fromkeys([column, *masks])))
    are_whole = isinstance(dataset, str | Path) and (Path(dataset).expanduser() / INFO_FILE).is_file()
    return Documents(found, column, is_tokenized, given, masks=masks, are_whole=are_whole)


def open_mixture(
    paths: Sequence[object],
    weights: Sequence[float] = (),
    split: str = "train",
    text_column: str | None = None,
    streaming: bool | None = None,
    field: str = "dataset_path",
) -> Documents:
    """Open several data sets as one: documents are drawn from the parts in turn, in a fixed random order.

    The mixture ends where the first of its parts ends. So no document comes twice, and the shares hold throughout.

    weights: how many documents come from each part, as shares of any sum; () takes equally many.
    streaming: None streams all parts if one of them is on the hub.
    The rest is as for `open_documents`.
    """
    parts = [open_documents(path, split, text_column, streaming, field) for path in paths]
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
    found = [
        part.dataset if part.column == column else part.dataset.rename_columns({part.column: column}) for part in parts
    ]
    if any(part.n_rows is None for part in parts):
        found = [one.to_iterable_dataset() if isinstance(one, datasets.Dataset) else one for one in found]
    if any(one.features is None or one.features != found[0].features for one in found):
        # Only where needed, because a cast writes all rows of a map-style data set anew.
        wanted = [_FEATURES[column] | {mask: _INTEGERS for mask in part.masks} for part in parts]
        found = [
            one if one.features == features else one.cast(datasets.Features(features))
            for one, features in zip(found, wanted, strict=True)
        ]
    masks = tuple(mask for mask in MASKS if any(mask in part.masks for part in parts))
    shares = np.asarray(weights if weights else [1.0] * len(parts), dtype=np.float64)
    mixed = datasets.interleave_datasets(
        found, probabilities=(shares / shares.sum()).tolist(), seed=_MIXTURE_SEED, stopping_strategy="first_exhausted"
    )
    names = [part.given.name for part in parts]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return Documents(
        mixed,
        column,
        tokenized[0],
        Given(field, f"the mixture of {listed}"),
        ends_with=f"the first of {listed}",
        masks=masks,
        parts=tuple(parts),
    )


def save_tokenized(documents: Documents, tokenize: Tokenize, folder: Path, n_processes: int) -> int:
    """Save the token ids of each document, in order, and return the number of documents.

    `folder` becomes a save_to_disk folder with the column `tokens`.
    """

    column, dataset, max_length = documents.column, documents.dataset, documents.max_chunk_length

    def tokens_of(text: str | None) -> list[int]:
        text = text or ""
        return [i for ids in tokenize([text[a:b] for a, b in pieces(text, max_length)]) for i in ids]

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    with _disk_named():
        if isinstance(dataset, datasets.Dataset):
            copy = dataset.map(
                lambda batch: {"tokens": [tokens_of(text) for text in batch[column]]},
                batched=True,
                batch_size=100,
                num_proc=min(n_processes, len(dataset)),
                remove_columns=dataset.column_names,
                features=features,
                load_from_cache_file=False,
                desc="tokenizing",
            )
        else:
            copy = datasets.Dataset.from_generator(
                lambda: ({"tokens": tokens_of(row[column])} for row in dataset), features=features
            )
        with disk_named(folder):
            copy.save_to_disk(folder)
    return len(copy)


# Finding the data -------------------------------------------------------------------------------


def _open_local(path: Path, given: Given, split: str, streaming: bool) -> Any:
    if path.is_dir() and (path / "dataset_dict.json").exists() | (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    files = _data_files(path, given)
    builder = _BUILDER_OF_SUFFIX[_data_suffix(files[0])]
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
    splits = _splits_of_files(files)
    wanted = [part.split("[")[0].strip() for part in split.split("+")]
    if not set(wanted) <= set(splits):
        raise _no_such_split(split, splits, given)
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        with _progress_bars_only_if(total > _PROGRESS_BAR_BYTES):
            return _load_dataset(
                builder,
                data_files={
                    part: [glob.escape(str(file.absolute())) for file in splits[part]] for part in dict.fromkeys(wanted)
                },
                split=split,
                streaming=streaming,
                **options,
            )
    except (DatasetsError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise given.empty() from error
        raise given.unreadable(error) from error


def _data_files(path: Path, given: Given) -> list[Path]:
    """The file itself, or all data files of a folder, sorted. Raises ValueError unless they are of one known kind."""
    known = "/".join(_BUILDER_OF_SUFFIX)
    if path.is_file():
        if _data_suffix(path) not in _BUILDER_OF_SUFFIX:
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
    files = [file for file in inside if _data_suffix(file) in _BUILDER_OF_SUFFIX]
    if not files:
        found = ", ".join(sorted({file.name for file in inside})[:8]) or "nothing"
        raise ValueError(
            f"{given.field}: folder {given.name} holds no {known} file; found: {found}; give a folder that does"
        )
    counts = Counter(_BUILDER_OF_SUFFIX[_data_suffix(file)] for file in files)
    if len(counts) > 1:
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        raise ValueError(
            f"{given.field}: folder {given.name} mixes kinds of files ({found}), expected one kind; "
            "name one file, or put the kinds into separate folders"
        )
    return files


def _data_suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _splits_of_files(files: list[Path]) -> dict[str, list[Path]]:
    shards = [_HUB_SHARD_NAME.match(file.name) for file in files]
    splits: dict[str, list[Path]] = {}
    for file, shard in zip(files, shards, strict=True):
        splits.setdefault(shard["split"] if shard and all(shards) else "train", []).append(file)
    return splits


def _open_hub(dataset: str | Path, given: Given, split: str, streaming: bool) -> Any:
    hub_name, path = str(dataset), Path(dataset).expanduser()
    is_hub_name = _HUB_NAME.fullmatch(hub_name) and not hub_name.startswith(".")
    not_local = f"{given.field}: {given.name} is neither a local path (looked for {str(path.absolute())!r}) nor"
    if not is_hub_name or _data_suffix(path) in _BUILDER_OF_SUFFIX:
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
