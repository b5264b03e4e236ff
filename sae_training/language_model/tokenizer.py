"""Finds the tokenizer that a model's own files hold, and tells it from one that a library makes up for missing files.

`AutoTokenizer` makes an empty tokenizer for some model types whose folder has no tokenizer files: for GPT-2 it knows
`<|endoftext|>` alone, as id 0. TransformerLens gives a tokenizer without end token the token `<|endoftext|>`, whose id
is then that of unknown words or one past the vocabulary. Neither id means anything to the model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae_training.machine.errors import first_line

_VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def read_tokenizer(name: str) -> Any | None:
    """Return the tokenizer of a folder or hub name; None if there is none. ValueError for one that cannot be read."""
    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if folder.is_dir() and not any(file for pattern in _VOCABULARY_FILES for file in folder.glob(pattern)):
            return None
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"model_name: the tokenizer of {name!r} could not be read ({first_line(error)}); expected tokenizer.json, "
            "or all files of its kind; save it again with tokenizer.save_pretrained."
        ) from error
    return None if is_made_up(tokenizer) else tokenizer


def is_made_up(tokenizer: Any) -> bool:
    """Return whether the tokenizer knows no token but special and added ones, so that it came from no vocabulary."""
    if tokenizer is None or not all(hasattr(tokenizer, part) for part in ("get_vocab", "get_added_vocab")):
        return False
    extra = {*tokenizer.get_added_vocab(), *map(str, tokenizer.all_special_tokens)}
    return all(token in extra for token in tokenizer.get_vocab())


def tokenizer_of(model: Any) -> Any | None:
    """Return the tokenizer of a loaded language model; None if it has none, or one that was made up."""
    tokenizer = model.tokenizer
    return None if is_made_up(tokenizer) else tokenizer


def for_bridge(tokenizer: Any | None) -> Any:
    """Return what a TransformerBridge is made with, in place of `tokenizer`: it takes no None, and adds missing tokens.

    `give_back` is called when the bridge is made.
    """
    if tokenizer is None or not knows_letters(tokenizer):
        stand_in = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
        return PreTrainedTokenizerFast(tokenizer_object=stand_in, unk_token="<unk>", eos_token="<unk>")
    return copy.deepcopy(tokenizer) if tokenizer.eos_token is None else tokenizer


def knows_letters(tokenizer: Any) -> bool:
    """Return whether the tokenizer can read the text "a", as TransformerLens has it do; one of chess moves may not."""
    try:
        tokenizer.encode("a")
    except Exception:  # the tokenizers library raises no other
        return False
    return True


def give_back(bridge: Any, tokenizer: Any | None) -> None:
    """Let the bridge have `tokenizer` as it was read, if TransformerLens would have made up an end token for it."""
    if tokenizer is None or tokenizer.eos_token is None or not knows_letters(tokenizer):
        bridge._tokenizer = tokenizer  # the setter would add the token again
        bridge.cfg.default_prepend_bos = tokenizer is not None and tokenizer.bos_token is not None
