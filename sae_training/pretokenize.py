"""The job that tokenises a data set once, into a local copy that runs read in its place.

    text --tokenizer of a model--> folder of token ids --dataset_path of later runs--> the contexts of the text itself

Runs tokenise ahead of need anyway. A copy saves that work where a large text is trained on often, or processors are
few. One copy serves every context size, with or without BOS, because contexts are packed in the run.
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
from sae_training.machine.files import flush_tree_to_disk, write_text
from sae_training.machine.paths import absolute
from sae_training.machine.phases import phase
from sae_training.machine.terminal import lasting
from sae_training.run.record import record_of_detached
from sae_training.text.chat import renderer
from sae_training.text.documents import Documents
from sae_training.text.open import open_documents, save_tokenized
from sae_training.text.pretokenized import INFO_FILE, check_same, probe
from sae_training.text.row_values import OnBadRows
from sae_training.text.tokenize import tokenizer_function


@lasting()
def pretokenize(
    model_name: str,
    dataset_path: str,
    folder: Path,
    dataset_split: str = "train",
    dataset_text_column: str | None = None,
    streaming: bool | None = None,
    n_processes: int | None = None,
    on_bad_rows: OnBadRows = "error",
) -> Path:
    """Write the token ids of `dataset_path` under the tokenizer of `model_name` to `folder`, and return `folder`.

    `on_bad_rows`: what becomes of rows of another type than their column's ("skip" leaves them out and counts them).
    A folder that already holds these ids is left as it is. Raises ValueError if the folder holds something else, or if
    the text has changed since. `n_processes`: None starts one for each processor.
    """
    info: dict[str, Any] = {
        "dataset_path": absolute("dataset_path", dataset_path),
        "dataset_split": dataset_split,
        "dataset_text_column": dataset_text_column,
        "tokenizer": model_name,
    }

    def opened(tokenizer: Any) -> Documents:
        source = (dataset_path, dataset_split, dataset_text_column, streaming)
        with phase("reading the text"):
            return open_documents(*source, on_bad_rows=on_bad_rows, render=renderer(tokenizer), notify=tqdm.write)

    if folder.exists():
        with suppress(FileNotFoundError):  # the model or the text may be gone, and the copy is still good
            info["probe"] = probe(tokenizer := loaded_tokenizer(model_name))
            info["content"] = opened(tokenizer).fingerprint
        check_same(folder, info)
        with record_of_detached("pretokenize", folder):
            tqdm.write(f"{folder} holds them already.")
        return folder
    tokenizer = loaded_tokenizer(model_name)
    documents = opened(tokenizer)
    info |= {"probe": probe(tokenizer), "content": documents.fingerprint}
    if documents.is_tokenized:
        raise ValueError(f"dataset_path: {documents.given.name} holds token ids already; train on it as it is.")
    with record_of_detached("pretokenize", folder):
        n_skipped = write_copy(documents, tokenizer, folder, info, n_processes or os.cpu_count() or 1)
    documents.bad_rows.say_skipped(n_skipped)
    return folder


def write_copy(documents: Documents, tokenizer: Any, folder: Path, info: dict[str, Any], n_processes: int) -> int:
    """Write the token ids of the documents and `info` to `folder`, or nothing; return how many were skipped."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        n, n_skipped = save_tokenized(documents, tokenizer_function(tokenizer), partial, n_processes)
        counts = {"n_documents": n, "n_skipped": n_skipped}
        write_text(partial / INFO_FILE, json.dumps(info | counts, indent=1) + "\n")
        flush_tree_to_disk(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return n_skipped


def loaded_tokenizer(model_name: str) -> Any:
    with phase("loading the tokenizer"):
        return load_tokenizer(model_name)
