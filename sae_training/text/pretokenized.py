"""TODO."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sae_training.text.tokenize import encoder_of

INFO_FILE = "pretokenized.json"

PROBE = "The quick brown fox isn't 12,345.67 km away: na\u00efve caf\u00e9s, \u4f60\u597d, def f(x):\n\treturn x**2\n"


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
