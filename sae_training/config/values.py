"""Values of config fields as text: one reader for all spellings, and the words of a command line."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal

from sae_training.config.checks import (
    described,
    is_slice,
    list_types,
    not_a_choice,
    options,
    reads_as_number,
    retired,
    single_types,
    slice_parts,
    without_retired,
)

SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def is_readable(hint: Any) -> bool:
    """Return whether `read_value` knows the type: fields of configs have no others."""
    simple = (int, float, str, bool, NoneType)
    return all(option in simple or typing.get_origin(option) in (Literal, list, tuple) for option in options(hint))


def read_value(text: str, hint: Any) -> Any:
    """Return the value that a text stands for in a field of this annotation; ValueError says what it may be.

    32, 2e6 and 2_000_000 are numbers; true, False, yes and 0 are switches; None and null are None; where lists are
    allowed, 16,32 and [16, 32] are lists, and () is an empty one; where slices are, -1: is -1,None.
    """
    if is_slice(hint) and isinstance(parts := slice_parts(text), tuple):
        return list(parts)
    if not list_types(hint):
        return _read_single(text.strip(), single_types(hint))
    is_list = text.lstrip().startswith(("[", "(")) or list_types(hint) == list(options(hint))
    words = [word.strip() for word in text.strip().strip("[]()").split(",")]
    values = [_read_single(word.strip("'\"") if is_list else word, single_types(hint)) for word in words if word]
    return values[0] if len(values) == 1 and not is_list else values


def _read_single(word: str, types: Sequence[Any]) -> Any:
    folded = word.lower()
    choices = [choice for kind in types if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if NoneType in types and folded in ("none", "null"):
        return None
    for choice in choices:
        if folded == choice.lower():
            return choice
    if bool in types and folded in SWITCH:
        return SWITCH[folded]
    if {int, float} & {*types} and reads_as_number(word):
        if int in types and float(word).is_integer():
            return int(word) if word.lstrip("+-").replace("_", "").isdecimal() else int(float(word))
        if float in types:
            return float(word)
    if str in types:
        return word
    others = [described(kind) for kind in types if typing.get_origin(kind) is not Literal]
    if choices:
        raise ValueError(not_a_choice(word, choices, others))
    raise ValueError(f"found {word!r}, expected {' or '.join(others)}")


def reads_as(text: str, hint: Any) -> bool:
    """Return whether `read_value` accepts the text."""
    try:
        read_value(text, hint)
    except ValueError:
        return False
    return True


def in_one_word(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with each flag and its value in one word; `types` are those of its fields.

    A parser that knows no types cannot tell where the values of a flag end and where MODEL and DATASET begin:

        --k 16 32 demo        ->  --k=16,32 demo          numbers and choices go on the list before them
        --k [16, 32] demo     ->  --k=[16,32] demo
        --use_ghost_grads     ->  --use_ghost_grads=True  a switch takes the next word only if that says yes or no
        --no-prepend-bos      ->  --prepend_bos=False
        --lr 1e-3             ->  --lr=1e-3               every other flag takes the next word
    """
    left, made = list(words), []
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        if flag.startswith("--") and name not in types and not equals and bool in options(types.get(positive)):
            made.append(f"--{positive}=False")
            continue
        if not flag.startswith("--") or name not in types:
            made.append(flag + equals + value)
            continue
        hint = types[name]
        is_switch = bool in options(hint)
        taken = [value] if equals else []
        if not equals and left and not left[0].startswith("--") and (not is_switch or reads_as(left[0], hint)):
            taken = [left.pop(0)]
        elif not equals and is_switch:
            taken = ["True"]
        while taken and list_types(hint) and str not in single_types(hint) and left and reads_as(left[0], hint):
            taken.append(left.pop(0))
        made.append(f"--{name}={','.join(word.rstrip(',') for word in taken)}" if taken else flag)
    return made


def without_retired_flags(words: Sequence[str], cls: type[Any]) -> list[str]:
    """Return the words without the flags of retired fields, and their values, which one warning names.

    Words NAME=VALUE after such a flag are flags of their own: --sae lr_end=0 becomes --lr_end=0.
    """
    left, kept, found = list(words), [], {}
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in retired(cls):
            kept.append(flag + equals + value)
            continue
        found[name], taken = None, [value] * bool(equals)
        while left and not left[0].startswith("--") and "=" in left[0]:
            taken.append(left.pop(0))
        kept += [f"--{pair}" for pair in taken if "=" in pair]
        if not taken and left and reads_as(left[0], bool | float | None):
            left.pop(0)
    without_retired(cls, found)
    return kept


def written(value: Any) -> str:
    """Return the text that `read_value` reads as the value."""
    return (",".join(map(str, value)) or "()") if isinstance(value, (list, tuple)) else str(value)


def metavar(hint: Any) -> str:
    """Return how help shows the values of a field: INT[,...], {None,auto}|FLOAT."""
    names = {int: "INT", float: "FLOAT", str: "STR"}
    types = single_types(hint)
    fixed = ["None"] * (NoneType in types) + ["True", "False"] * (bool in types)
    fixed += [choice for kind in types if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    shown = ["{" + ",".join(fixed) + "}"] * bool(fixed) + [names[kind] for kind in types if kind in names]
    return "|".join(shown) + "[,...]" * bool(list_types(hint))
