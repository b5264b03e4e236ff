"""Recognise a folder of token ids that `pretokenize` wrote, and the tokenizer that made the ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sae_training.text.tokenize import tokenizer_function

INFO_FILE = "pretokenized.json"

_PROBE = "The quick brown fox isn't 12,345.67 km away: na\u00efve caf\u00e9s, \u4f60\u597d, def f(x):\n\treturn x**2\n"


def check_same(folder: Path, info: dict[str, Any]) -> None:
    """Raise ValueError unless `folder` holds the ids that `info` describes.

    "probe" and "content" are compared only where both sides know them: a streamed text, for example, has no "content".
    """
    if not (folder / INFO_FILE).is_file():
        raise ValueError(f"output: {folder} exists and holds no tokenized data set; give another path.")
    made_with = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    for name, value in info.items():
        found = made_with.get(name)
        if name in ("probe", "content") and None in (value, found):
            continue
        if found != value:
            raise ValueError(
                f"{name}: {folder} was made with {found!r}, but this asks for {value!r}; give another output."
            )


def probe(tokenizer: Any) -> str:
    """A hash of the ids of one sentence, which tells tokenizers apart. Tokens added by a user do not change it."""
    (ids,) = tokenizer_function(tokenizer)([_PROBE])
    return hashlib.sha256(repr([int(i) for i in ids]).encode()).hexdigest()[:16]


def check_tokenizer(dataset: object, tokenizer: Any, field: str = "dataset_path") -> None:
    """Raise ValueError if `dataset` is a folder of `pretokenize` whose ids another tokenizer than `tokenizer` made."""
    if not isinstance(dataset, str | Path) or not (path := Path(dataset).expanduser() / INFO_FILE).is_file():
        return
    made_with = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer is None or made_with.get("probe") is None:
        return
    if made_with["probe"] != (found := probe(tokenizer)):
        raise ValueError(
            f"{field}: {dataset} holds ids of the tokenizer of {made_with['tokenizer']!r} (probe {made_with['probe']})"
            f", but this model has another ({found}); pretokenize the text for this model."
        )
