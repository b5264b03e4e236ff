"""Values of config fields as text: one reader for all spellings, and the words of a command line."""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
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

SWITCH = {word: True for word in ("true", "yes", "on", "1", "t", "y")}
SWITCH |= {word: False for word in ("false", "no", "off", "0", "f", "n")}

CLOSING = {"[": "]", "(": ")"}

# An element of a list: a text in quotes, or else what stands before the next comma.
ELEMENT = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|$)""", re.DOTALL)


def is_readable(hint: Any) -> bool:
    """Return whether `read_value` knows the type: fields of configs have no others."""
    simple = (int, float, str, bool, NoneType)
    return all(
        option in simple or typing.get_origin(option) in (Literal, list, tuple, dict) for option in options(hint)
    )


def read_value(text: str, hint: Any) -> Any:
    """Return the value that a text stands for in a field of this annotation; ValueError says what it may be.

    32, 2e6 and 2_000_000 are numbers; true, False, yes, off and 0 are switches; None and null are None; where lists are
    allowed, 16,32 and [16, 32] are lists, and () is an empty one; where slices are, -1: is -1,None. Quotes are those of
    Python and JSON: "a, b" is one value, and 'None' is a text where there may be one.
    """
    if is_slice(hint) and isinstance(parts := slice_parts(text), tuple):
        return list(parts)
    text, types = text.strip(), single_types(hint)
    if not list_types(hint):
        return _read_single(text, types)
    inner = _inside_brackets(text)
    is_list = inner is not None or list_types(hint) == list(options(hint))
    values = [_read_single(word, types) for word in _elements(text if inner is None else inner)]
    return values[0] if len(values) == 1 and not is_list else values


def _inside_brackets(text: str) -> str | None:
    """Return what stands inside the brackets around the whole text; None if there are none around all of it."""
    if text[:1] not in CLOSING or text[-1:] != CLOSING[text[0]] or len(text) < 2:
        return None
    bare, depth = _without_quoted(text), 0
    for position, letter in enumerate(bare):
        depth += (letter == text[0]) - (letter == text[-1])
        if depth == 0 and position < len(bare) - 1:
            return None
    return text[1:-1]


def _is_open(text: str, hint: Any) -> bool:
    """Return whether a bracket of the text does not close: the first letter, or any where only numbers may stand."""
    bare = _without_quoted(text)
    opening = [*CLOSING] if str not in single_types(hint) else [text[0]] if text[:1] in CLOSING else []
    return any(bare.count(bracket) > bare.count(CLOSING[bracket]) for bracket in opening)


def _without_quoted(text: str) -> str:
    """Return the text without its elements in quotes: what these hold neither opens nor closes a list."""
    return re.sub(r"""(^|(?<=[\[(,\s]))("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", "", text)


def _elements(text: str) -> list[str]:
    """Return the elements of a list, in their quotes; an empty one is left out, so that a comma may end the list."""
    return [found[1] for found in ELEMENT.finditer(text) if found[1]]


def _unquoted(word: str) -> str | None:
    """Return the text that a word in quotes stands for, as JSON or else Python writes it; None if it has no quotes."""
    if len(word) < 2 or word[0] != word[-1] or word[0] not in "\"'":
        return None
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape, as in 'C:\data', stays as it is
            if isinstance(found := read(word), str):
                return found
    return word[1:-1]


def _read_single(word: str, types: Sequence[Any]) -> Any:
    quoted = _unquoted(word)
    if quoted is not None and str in types:
        return quoted
    word = word if quoted is None else quoted.strip()
    folded = word.lower()
    choices = [choice for kind in types if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if NoneType in types and folded in ("none", "null"):
        return None
    for choice in choices:
        if folded == choice.lower() or (folded, choice) == ("null", "none"):
            return choice
    if word.startswith("{") and any(typing.get_origin(kind) is dict for kind in types):
        return _read_json(word)
    is_number = reads_as_number(word)
    if bool in types and (folded in SWITCH or is_number and float(word) in (0, 1)):
        return SWITCH[folded] if folded in SWITCH else bool(float(word))
    if {int, float} & {*types} and is_number:
        if int in types and float(word).is_integer():
            return int(word) if word.lstrip("+-").replace("_", "").isdecimal() else int(float(word))
        if float in types:
            return float(word)
    if str in types:
        if folded in ("none", "null") and quoted is None:
            raise ValueError(
                f"found {word}, which this field does not take; leave it out, or write '\"{word}\"' for a name"
            )
        return word
    others = [described(kind) for kind in types if typing.get_origin(kind) is not Literal]
    if choices:
        raise ValueError(not_a_choice(word, choices, others))
    raise ValueError(f"found {word!r}, expected {' or '.join(others)}")


def _read_json(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError as error:
        raise ValueError(f"found {word!r}, expected JSON ({error}), with names in double quotes") from error


def reads_as(text: str, hint: Any) -> bool:
    """Return whether `read_value` accepts the text."""
    try:
        read_value(text, hint)
    except ValueError:
        return False
    return True


def is_meant_for(word: str, hint: Any) -> bool:
    """Return whether a word after a flag is a value, perhaps a wrong one, rather than the name of a model or a text.

    `hint` is the annotation of a switch or of a list of numbers or choices, of which `ture` and `1.5` are wrong values.
    """
    fixed = ["true", "false"] * (bool in options(hint))
    fixed += [c for kind in single_types(hint) if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
    misspelt = difflib.get_close_matches(word.lower(), fixed, n=1, cutoff=0.75)
    nothing = word.strip().lower() in ("", "none", "null")
    return reads_as(word, hint) or is_number(word) or bool(misspelt) or nothing or word[0] in CLOSING


def is_number(word: str) -> bool:
    """Return whether a word is a number, perhaps in quotes."""
    unquoted = _unquoted(word)
    return reads_as_number(word if unquoted is None else unquoted)


def is_no_name(word: str) -> bool:
    """Return whether a word is a number or a list, and so a value that has strayed from its flag."""
    return is_number(word) or word[:1] in (*CLOSING, "{", "")


def check_alone(given: Sequence[str], words: Sequence[str], types: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError if more words stand alone than a verb has `names` for; the one after a switch was meant for it.

    `words` is what `in_one_word` makes of `given`.
    """
    alone = [word for word in words if not word.startswith("-")]
    if len(alone) <= len(names):
        return
    for flag, word in itertools.pairwise(given):
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and word in alone and bool in options(types.get(name)):
            raise ValueError(f"{name}: found {word!r}, expected True or False.")
    expected = f"at most {len(names)} ({' '.join(names)})" if names else "none"
    raise ValueError(f"found {len(alone)} words without a flag ({', '.join(alone)}), expected {expected}.")


def in_one_word(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with each flag and its value in one word; `types` are those of its fields.

    A parser that knows no types cannot tell where the values of a flag end and where MODEL and DATASET begin:

        --k 16 32 demo        ->  --k=16,32 demo          numbers and choices go on the list before them
        --k [16, 32] demo     ->  --k=[16,32] demo        a list goes on to its closing bracket
        --use_ghost_grads     ->  --use_ghost_grads=True  a switch takes the next word only if that says yes or no
        --no-prepend-bos      ->  --prepend_bos=False
        --lr 1e-3             ->  --lr=1e-3               every other flag takes the next word
        k=16                  ->  --k=16                  as wandb writes it for ${args_no_hyphens}

    A word that is no value of the flag but resembles one, as 1.5 after --k 16, is taken too, so that the flag is named
    as wrong and the word does not become MODEL.
    """
    left, made = list(words), []
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        if (flag.startswith("--") or equals) and name in types:
            taken = _values_after([value] if equals else [], left, types[name])
            made.append(f"--{name}={','.join(word.rstrip(',') for word in taken)}" if taken else flag)
        elif flag.startswith("--") and bool in options(types.get(positive)):
            if equals or left and reads_as(left[0], bool):
                raise ValueError(f"{flag}: found {value or left[0]!r}, expected no value; write --{positive} False")
            made.append(f"--{positive}=False")
        else:
            made.append(flag + equals + value)
    return made


def _values_after(taken: list[str], left: list[str], hint: Any) -> list[str]:
    """Return the words that are values of one flag; `taken` are those joined to it, `left` loses the others."""
    is_switch, is_list, is_text = bool in options(hint), bool(list_types(hint)), str in single_types(hint)
    if not taken and left and not left[0].startswith("--") and (not is_switch or is_meant_for(left[0], hint)):
        taken = [left.pop(0)]
    elif not taken and is_switch:
        taken = ["True"]
    while taken and left and not left[0].startswith("--"):
        goes_on = (is_list or not is_text) and _is_open(",".join(taken), hint)
        strays = not is_text and (is_meant_for(left[0], hint) if is_list else is_number(left[0]))
        if not goes_on and not strays:
            break
        taken.append(left.pop(0))
    return taken


OF_PEERS = {"distribute_layers": ("parallel", "layers"), "distribute_modules": ("parallel", "layers")}
"""Switches of sparsify, and the field and value that they stand for here."""


def in_our_names(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Return the words with a peer's switch as the flag of the field that it stands for, where a verb has that field.

    A switch that says no is left out. ValueError if the field is given as well, with another value.
    """
    left, made, meant = list(words), [], {}
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        known = flag.startswith("--") and OF_PEERS.get(name.removeprefix("no_"), ("", ""))[0] in types
        if not known:
            made.append(flag + equals + value)
            continue
        says = name in OF_PEERS
        if equals or left and not left[0].startswith("--") and reads_as(left[0], bool):
            says = bool(read_value(value if equals else left.pop(0), bool))
        if says:
            meant[OF_PEERS[name][0]] = (name, OF_PEERS[name][1])
    for field, (name, value) in meant.items():
        given = in_one_word(made, types)
        others = [word for word in given if word.startswith(f"--{field}=") and word != f"--{field}={value}"]
        if others:
            raise ValueError(f"{name}: found it with {others[0]}, expected --{field} {value} or none; leave one out")
        made.append(f"--{field}={value}")
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
    if isinstance(value, dict):
        return json.dumps(value)
    if not isinstance(value, (list, tuple)):
        return _quoted(value)
    inner = ",".join(map(_quoted, value))
    return f"[{inner}]" if isinstance(value, list) and len(value) == 1 else inner or "()"


def _quoted(value: Any) -> str:
    """Return a single value as text, in quotes if it would be read as something else without them."""
    text = str(value)
    is_plain = text == text.strip() != "" and not {*text} & {*",[]()\"'"}
    return text if is_plain or not isinstance(value, str) else json.dumps(text)


def metavar(hint: Any) -> str:
    """Return how help shows the values of a field: INT[,...], {None,auto}|FLOAT."""
    names = {int: "INT", float: "FLOAT", str: "STR", dict: "JSON"}
    types = [dict if typing.get_origin(kind) is dict else kind for kind in single_types(hint)]
    fixed = ["None"] * (NoneType in types) + ["True", "False"] * (bool in types)
    fixed += [choice for kind in types if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    shown = ["{" + ",".join(fixed) + "}"] * bool(fixed) + [names[kind] for kind in types if kind in names]
    return "|".join(shown) + "[,...]" * bool(list_types(hint))
