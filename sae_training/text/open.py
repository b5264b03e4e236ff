"""Opening data sets: names, files, folders and `datasets` objects all become one document source.

    dataset --open_documents--> Documents --> TokenStream
    several --open_mixture--> Documents

The only file that imports `datasets`.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from sae_training.demo_data import bundled_text
from sae_training.text.columns import _choose_column, _column_kinds, _first_line, _has_transform, _no_rows, _unreadable
from sae_training.text.documents import Documents, pieces

_BUILDER_OF_SUFFIX = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_HUB_SHARD_NAME = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

# Reading local files into the Arrow cache takes seconds from here on: then show the progress bar.
_PROGRESS_BAR_BYTES = 100_000_000

# Arrow counts the bytes of a string with 32 bits.
_MAX_TEXT_FILE_BYTES = 2**31 - 1

# The same in all runs: the order of a mixture must be that of the run that is resumed.
_MIXTURE_SEED = 42

_FEATURES = {
    "text": datasets.Features({"text": datasets.Value("string")}),
    "tokens": datasets.Features({"tokens": datasets.List(datasets.Value("int64"))}),
}

# Its overloads know no streaming flag that is a variable.
_load_dataset: Callable[..., Any] = datasets.load_dataset


def open_documents(
    dataset: object,
    split: str = "train",
    text_column: str | None = None,
    streaming: bool | None = None,
) -> Documents:
    """Documents of a data set: an object, a local file or folder, a bundled name or a hub name.

    dataset: a `datasets` object (`split` then only chooses from a dict of splits); a .txt (one
        document), .jsonl, .json or .parquet file, also gzipped; a folder of such files of one kind,
        searched in depth, in sorted order, where files named train-00000-of-00002.parquet are parts
        of that split and all others are "train"; a save_to_disk folder; "demo"; else "owner/name"
        or "owner/name:config" on the hub.
    text_column: None finds it: integer lists in tokens or input_ids, strings in text or content,
        or the only column of strings.
    streaming: None streams from the hub and reads local files through the Arrow cache.
    """
    if isinstance(dataset, str | Path):
        name = repr(str(dataset))
        path = Path(bundled_text(dataset) if isinstance(dataset, str) else dataset).expanduser()
        is_local = path.exists() and dataset != ""
        streaming = not is_local if streaming is None else streaming
        if streaming and set("[+") & set(split):
            raise ValueError(
                f"dataset_split: {split!r} is more than the name of a split, and nothing else can be "
                "streamed; set streaming=False"
            )
        found = _open_local(path, name, split, streaming) if is_local else _open_hub(str(dataset), split, streaming)
    elif isinstance(
        dataset,
        datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict,
    ):
        found, name = dataset, f"the {type(dataset).__name__} passed in"
    else:
        raise ValueError(
            f"dataset: got {type(dataset).__name__}; expected a name, a path or a Dataset, "
            "IterableDataset or DatasetDict (a list: datasets.Dataset.from_dict({'text': [...]}))"
        )
    if isinstance(found, Mapping):
        found = _pick_split(found, split, name)
    if isinstance(found, datasets.Dataset) and len(found) == 0:
        raise _no_rows(name)
    if streaming and isinstance(found, datasets.Dataset):
        found = found.to_iterable_dataset()
    has_transform = _has_transform(found)
    if not has_transform:
        found = found.with_format(None)
    column, is_tokenized = _choose_column(_column_kinds(found, name), text_column, name)
    if not has_transform:
        found = found.select_columns([column])
    return Documents(found, column, is_tokenized, name)


def open_mixture(
    paths: Sequence[object],
    weights: Sequence[float] = (),
    split: str = "train",
    text_column: str | None = None,
    streaming: bool | None = None,
) -> Documents:
    """Documents of several data sets, each of `open_documents`, drawn from them in turn in a fixed random order.

    weights: how many documents come from each, as shares of any sum; () takes equally many. The end is where the first
        of them ends, so none has its documents twice and the shares hold throughout.
    streaming: None streams all if one is on the hub.
    """
    parts = [open_documents(path, split, text_column, streaming) for path in paths]
    names = [part.name for part in parts]
    if len(parts) == 1:
        return parts[0]
    tokenized = [part.is_tokenized for part in parts]
    if any(tokenized) and not all(tokenized):
        ids, text = parts[tokenized.index(True)], parts[tokenized.index(False)]
        raise ValueError(
            f"dataset_path: {ids.name} holds token ids (column {ids.column!r}), but {text.name} text (column "
            f"{text.column!r}); give only one of the kinds, or set dataset_text_column to what they have in common"
        )
    column = "tokens" if tokenized[0] else "text"
    found = [
        part.dataset if part.column == column else part.dataset.rename_columns({part.column: column}) for part in parts
    ]
    if any(part.n_rows is None for part in parts):
        found = [one.to_iterable_dataset() if isinstance(one, datasets.Dataset) else one for one in found]
    if any(one.features is None or one.features != found[0].features for one in found):
        # Only where it must: the rows of a map-style data set are written anew by it.
        features = _FEATURES[column]
        found = [one if one.features == features else one.cast(features) for one in found]
    shares = np.asarray(weights if weights else [1.0] * len(parts), dtype=np.float64)
    mixed = datasets.interleave_datasets(
        found, probabilities=(shares / shares.sum()).tolist(), seed=_MIXTURE_SEED, stopping_strategy="first_exhausted"
    )
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return Documents(mixed, column, tokenized[0], f"the mixture of {listed}", f"the first of {listed}")


def save_tokenized(
    documents: Documents, encode: Callable[[list[str]], list[Any]], folder: Path, n_processes: int
) -> int:
    """Save the token ids of each document, in order, in the column `tokens` of a save_to_disk folder; how many."""

    def tokens_of(texts: list[str | None]) -> list[list[int]]:
        return [[i for ids in encode(list(pieces(text or ""))) for i in ids] for text in texts]

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    column, dataset = documents.column, documents.dataset
    if isinstance(dataset, datasets.Dataset):
        copy = dataset.map(
            lambda batch: {"tokens": tokens_of(batch[column])},
            batched=True,
            batch_size=100,
            num_proc=min(n_processes, len(dataset)),
            remove_columns=dataset.column_names,
            features=features,
            load_from_cache_file=False,
            desc="tokenizing",
        )
    else:

        def rows() -> Iterator[dict[str, list[int]]]:
            for row in dataset:
                yield {"tokens": tokens_of([row[column]])[0]}

        copy = datasets.Dataset.from_generator(rows, features=features)
    copy.save_to_disk(folder)
    return len(copy)


# Finding the data -------------------------------------------------------------------------------


def _open_local(path: Path, name: str, split: str, streaming: bool) -> Any:
    if path.is_dir() and (path / "dataset_dict.json").exists() | (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    files = _data_files(path, name)
    builder = _BUILDER_OF_SUFFIX[_data_suffix(files[0])]
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes == 0:
        raise ValueError(f"dataset_path: {name} is empty (0 bytes); it must hold text")
    if builder == "text":
        largest = max(files, key=lambda file: file.stat().st_size)
        if largest.stat().st_size > _MAX_TEXT_FILE_BYTES:
            raise ValueError(
                f"dataset_path: {largest} has {largest.stat().st_size} bytes, but a document can have "
                f"at most {_MAX_TEXT_FILE_BYTES}; split it into several .txt files"
            )
    splits = _splits_of_files(files)
    wanted = [part.split("[")[0].strip() for part in split.split("+")]
    if not set(wanted) <= set(splits):
        raise _no_such_split(split, splits, name)
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        with _progress_bars_only_if(n_bytes > _PROGRESS_BAR_BYTES):
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
            raise _no_rows(name) from error
        raise _unreadable(name, error) from error


def _data_files(path: Path, name: str) -> list[Path]:
    """The file itself, or all files of the one kind in a folder, sorted."""
    known = "/".join(_BUILDER_OF_SUFFIX)
    if path.is_file():
        if _data_suffix(path) not in _BUILDER_OF_SUFFIX:
            raise ValueError(
                f"dataset_path: {name} is a {path.suffix or 'suffixless'} file, expected {known}; "
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
        raise ValueError(f"dataset_path: folder {name} holds no {known} file; found: {found}")
    counts = Counter(_BUILDER_OF_SUFFIX[_data_suffix(file)] for file in files)
    if len(counts) > 1:
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        raise ValueError(
            f"dataset_path: folder {name} mixes kinds of files ({found}), expected one kind; "
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


def _open_hub(given: str, split: str, streaming: bool) -> Any:
    path, name = Path(given).expanduser(), repr(given)
    is_hub_name = _HUB_NAME.fullmatch(given) and not given.startswith(".")
    if not is_hub_name or _data_suffix(path) in _BUILDER_OF_SUFFIX:
        folder = path.absolute().parent
        hint = _near_names(path) if folder.exists() else f"; the folder {str(folder)!r} does not exist"
        raise FileNotFoundError(
            f"dataset_path: {name} is neither a local path (looked for {str(path.absolute())!r}) "
            f"nor a name that a data set on the hub can have (owner/name){hint}"
        )
    repository, _, config = given.partition(":")
    try:
        return _load_dataset(repository, config or None, split=split, streaming=streaming)
    except (ValueError, RuntimeError) as error:
        if "split" in str(error).lower():
            raise ValueError(f"dataset_split: {name} has no split {split!r}: {error}") from error
        raise ValueError(
            f"dataset_path: {name} on the hub could not be opened: {error} (a config is chosen as 'owner/name:config')"
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"dataset_path: {name} is neither a local path (looked for {str(path.absolute())!r}) "
            f"nor reachable on the Hugging Face hub ({_first_line(error)}); without a network, give "
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


def _pick_split(splits: Mapping[Any, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise _no_such_split(split, splits, name)
    return splits[split]


def _no_such_split(split: str, splits: Iterable[Any], name: str) -> ValueError:
    return ValueError(f"dataset_split: {name} has no split {split!r}; it has: {', '.join(map(str, splits))}")


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
