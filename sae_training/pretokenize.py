"""Tokenising a data set once, into a local copy that runs read in its place.

Runs tokenise ahead of need; of a large text that is trained on often, or with few processors, the copy
saves that work. Contexts are packed in the run, so one copy serves every context size, with or without BOS, and gives
the contexts that the text itself would give.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_training.language_model.load import load_tokenizer
from sae_training.machine.files import write_text
from sae_training.machine.paths import absolute
from sae_training.text.open import open_documents, save_tokenized
from sae_training.text.pretokenized import INFO_FILE, check_same, probe
from sae_training.text.tokenize import encoder_of


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
