"""Tokenising a data set once, into a local copy that runs read in its place.

Runs tokenise ahead of need; of a large text that is trained on often, or with few processors, the copy
saves that work. Contexts are packed in the run, so one copy serves every context size, with or without BOS, and gives
the contexts that the text itself would give.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_training.encoders import encoder_of
from sae_training.language_model import load_tokenizer
from sae_training.run_folder import absolute
from sae_training.text_data import open_documents, save_tokenized
from sae_training.weights import write_text

INFO_FILE = "pretokenized.json"
PROBE = "The quick brown fox isn't 12,345.67 km away: na\u00efve caf\u00e9s, \u4f60\u597d, def f(x):\n\treturn x**2\n"


def pretokenize(
    model_name: str,
    dataset_path: str,
    folder: Path,
    dataset_split: str = "train",
    dataset_text_column: str | None = None,
    streaming: bool | None = None,
    n_processes: int | None = None,
) -> Path:
    """Write the token ids of `dataset_path` under the tokenizer of `model_name` to `folder`, and return it.

    A folder that holds them already is left as it is; ValueError if it holds something else, or if the text has changed
    since. `n_processes` None is one for each processor.
    """
    info: dict[str, Any] = {
        "dataset_path": absolute("dataset_path", dataset_path),
        "dataset_split": dataset_split,
        "dataset_text_column": dataset_text_column,
        "tokenizer": model_name,
    }
    if folder.exists():
        with suppress(FileNotFoundError):  # neither need be there any more
            info["probe"] = probe(load_tokenizer(model_name))
            info["content"] = open_documents(dataset_path, dataset_split, dataset_text_column, streaming).fingerprint
        check_same(folder, info)
        tqdm.write(f"{folder} holds them already.")
        return folder
    documents = open_documents(dataset_path, dataset_split, dataset_text_column, streaming)
    tokenizer = load_tokenizer(model_name)
    info |= {"probe": probe(tokenizer), "content": documents.fingerprint}
    if documents.is_tokenized:
        raise ValueError(f"dataset_path: {documents.name} holds token ids already; train on it as it is.")
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    n = save_tokenized(documents, encoder_of(tokenizer), partial, n_processes or os.cpu_count() or 1)
    write_text(partial / INFO_FILE, json.dumps(info | {"n_documents": n}, indent=1) + "\n")
    os.replace(partial, folder)
    return folder


def check_same(folder: Path, info: dict[str, Any]) -> None:
    if not (folder / INFO_FILE).is_file():
        raise ValueError(f"output: {folder} exists and holds no tokenized data set; give another path.")
    found = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    for name, value in info.items():
        if name in ("probe", "content") and None in (value, found.get(name)):  # not known, of a stream for instance
            continue
        if found.get(name) != value:
            raise ValueError(
                f"{name}: {folder} was made with {found.get(name)!r}, but this asks for {value!r}; give another output."
            )


def probe(tokenizer: Any) -> str:
    """A hash of the ids of a sentence, which tells tokenizers apart, whatever tokens were added to one of them."""
    (ids,) = encoder_of(tokenizer)([PROBE])
    return hashlib.sha256(repr([int(i) for i in ids]).encode()).hexdigest()[:16]


def check_tokenizer(dataset_path: object, tokenizer: Any) -> None:
    """ValueError if `dataset_path` is a folder that was made here with other ids than those of `tokenizer`."""
    if not isinstance(dataset_path, str | Path) or not (path := Path(dataset_path).expanduser() / INFO_FILE).is_file():
        return
    made_with = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer is None or made_with.get("probe") is None:
        return
    if made_with["probe"] != (found := probe(tokenizer)):
        raise ValueError(
            f"dataset_path: {dataset_path} holds ids of the tokenizer of {made_with['tokenizer']!r} (probe "
            f"{made_with['probe']}), but this model's is another ({found}); pretokenize the text for this model."
        )
