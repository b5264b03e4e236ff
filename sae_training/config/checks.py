"""One value of a config against its annotation: its type, its range, the nearest name for a misspelt one.

Nothing here knows a config class, imports torch or touches a device, so that the command line can check before
anything slow happens. Which fields fit together is said in `rules`.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, Union

from sae_training.config.types import LABELS, Limit

C = TypeVar("C")

# What people type for a choice or a field that is spelled quite differently here.
ALIASES = {
    "gpu": "cuda",
    "relu": "standard",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "learning_rate": "lr",
    "batch_size": "train_batch_size",
    "hook_name": "hook_point",
    "model": "model_name",
    "dataset": "dataset_path",
    "layer": "hook_point_layer",
    "layers": "hook_point_layer",
}

# -------------------------------------------------------------------------------------------------------- annotations


@functools.cache
def field_types(cls: type[Any]) -> dict[str, Any]:
    """Return the annotation of each field, with its marks."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def marks(hint: Any) -> tuple[Any, ...]:
    """Return the marks on a whole annotation."""
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()


def fields_marked(cls: type[Any], mark: Any) -> tuple[str, ...]:
    """Return the fields of `cls` whose annotation carries the mark, in order."""
    return tuple(name for name, hint in field_types(cls).items() if mark in marks(hint))


@functools.cache
def options(hint: Any) -> tuple[Any, ...]:
    """Return the types that an annotation offers, without marks."""
    if typing.get_origin(hint) is Annotated:
        return options(hint.__origin__)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(option for part in typing.get_args(hint) for option in options(part))
    return (hint,)


@functools.cache
def list_types(hint: Any) -> list[Any]:
    """Return the lists and tuples that an annotation offers."""
    return [option for option in options(hint) if typing.get_origin(option) in (list, tuple)]


def is_slice(hint: Any) -> bool:
    """Return whether an annotation is that of a slice."""
    return bool(list_types(hint)) and type(None) in single_types(hint) and list_types(hint) == list(options(hint))


def single_types(hint: Any) -> list[Any]:
    """Return the types that one value may have: those beside lists, or of the elements where there are only lists."""
    lists = list_types(hint)
    return [option for option in options(hint) if option not in lists] or list(options(typing.get_args(lists[0])[0]))


# -------------------------------------------------------------------------------------------------------------- names


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` was probably meant to be, or None."""
    folded = {known.lower().replace("-", "_"): known for known in names}
    wanted = ALIASES.get(name.lower(), name.lower()).replace("-", "_")
    if wanted in folded:
        return folded[wanted]
    matches = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    matches += [known for known in folded if len(wanted) > 2 and known.startswith(wanted)]
    return folded[matches[0]] if matches else None


def unknown_names(given: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """Return one line for each of `given` that is not in `known`, with the nearest known name."""
    known = list(known)
    lines = []
    for name in given:
        if name in known:
            continue
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else "see the files of sae_training/config for the fields"
        lines.append(f"{name}: not a field of {what}; {hint}")
    return lines


def checked_names(cls: type[C]) -> type[C]:
    """Make a dataclass answer unknown keywords with the nearest field, and accept retired ones."""
    original: Callable[..., None] = cls.__init__
    known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType] - a dataclass

    # wraps keeps the signature that editors, inspect and dataclasses.replace see
    @functools.wraps(original)
    def __init__(self: C, *args: object, **keywords: object) -> None:
        keywords = without_retired(cls, keywords)
        if lines := unknown_names(keywords, known, cls.__name__):
            raise TypeError("\n".join(lines))
        original(self, *args, **keywords)

    cls.__init__ = __init__
    return cls


def retired(cls: type[Any]) -> dict[str, str]:
    """Return the names of fields that `cls` once had, each with what to do; its groups say them in RETIRED."""
    return {name: advice for part in cls.__mro__ for name, advice in vars(part).get("RETIRED", {}).items()}


def without_retired(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without those of retired fields, which one warning names.

    If a retired field held values by name, the fields of these names get them.
    """
    found = {name: advice for name, advice in retired(cls).items() if name in values}
    if found:
        lines = [f"{name}: no longer a field of {cls.__name__}; {advice}" for name, advice in found.items()]
        warnings.warn("\n".join(lines), FutureWarning, stacklevel=3)
    moved = {name: value for old in found if isinstance(values[old], Mapping) for name, value in values[old].items()}
    return moved | {name: value for name, value in values.items() if name not in found}


# ------------------------------------------------------------------------------------------------------------- values


def plain_values(cfg: Any) -> dict[str, Any]:
    """Return the fields as they are stored and checked: dtypes and devices by name, paths as text."""
    hints = field_types(type(cfg))
    return {f.name: plain_value(getattr(cfg, f.name), hints[f.name]) for f in fields(cfg)}


def plain_value(value: Any, hint: Any) -> Any:
    """Return one value without torch, numpy and path types."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, range) and is_slice(hint):
        value = slice(value.start, value.stop, None if value.step == 1 else value.step)
    if isinstance(value, range) or type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 1:
        value = list(value) if isinstance(value, range) else value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_slice(hint) and isinstance(value, slice | str):
        return slice_parts(value)
    if isinstance(value, float) and value.is_integer() and int in options(hint) and float not in options(hint):
        return int(value)  # 2e6 tokens
    if isinstance(value, (list, tuple)):
        return tuple(value) if [typing.get_origin(option) for option in list_types(hint)] == [tuple] else list(value)
    return value


def slice_parts(value: slice | str) -> Any:
    """Return start, stop and, if there is one, step of a slice or its text (-1: or ::2); other text as it is."""
    if isinstance(value, slice):
        return (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
    words = value.strip().strip("[]()'\"").split(":")
    try:
        return tuple(int(word) if word.strip() else None for word in words) if len(words) > 1 else value
    except ValueError:
        return value


def value_problems(values: Mapping[str, Any], cls: type[Any]) -> dict[str, str]:
    """Return what is wrong with each value by itself; `values` may hold only some of the fields."""
    found: dict[str, str] = {}
    for name, hint in field_types(cls).items():
        if name in values and (problem := _problem(plain_value(values[name], hint), hint)):
            found[name] = f"{name}: {problem}"
    return found


def _problem(value: Any, hint: Any) -> str | None:
    if not _fits(value, hint):
        return _misfit(value, hint)
    if isinstance(value, list):
        return _problem_of_list(value, hint)
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, (int, float)) and not math.isfinite(part):
            return f"found {part}, expected a finite number; change it"
        limit = _broken_limit(part, hint)
        if limit is not None and limit.choices:
            return not_a_choice(str(part), limit.choices)
        if limit is not None:
            return f"found {part!r}, expected {limit.expected}; {limit.advice}"
    return None


def _problem_of_list(values: list[Any], hint: Any) -> str | None:
    if not values:
        return "found an empty list, expected at least one value; give one or leave the field out"
    if "all" in values:
        return f"found {values}, expected numbers or the word all by itself; change it"
    if len(set(values)) < len(values):
        return f"found {values}, expected values that differ; leave the repeated ones out"
    return next(filter(None, (_problem(value, hint) for value in values)), None)


def _broken_limit(value: Any, hint: Any) -> Limit | None:
    """Return the first limit in an annotation that the single `value` breaks, on a type that it has."""
    for option, limit in _limits(hint):
        if _fits(value, option) and not limit.holds(value):
            return limit
    return None


@functools.cache
def _limits(hint: Any) -> list[tuple[Any, Limit]]:
    """Return the types inside an annotation that have limits, with these."""
    found = [(hint, mark) for mark in marks(hint) if isinstance(mark, Limit)]
    parts = (hint.__origin__,) if marks(hint) else typing.get_args(hint)
    return found + [pair for part in parts for pair in _limits(part)]


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_type(value, option) for option in options(hint))


def _fits_type(value: Any, option: Any) -> bool:
    origin = typing.get_origin(option)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(option)
    if origin is dict:
        key, element = typing.get_args(option)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(part, element) for k, part in value.items())
    if origin in (list, tuple):
        element = typing.get_args(option)[0]
        return type(value) is origin and all(_fits(part, element) for part in value)
    if option in (int, float):
        return isinstance(value, (int, option)) and not isinstance(value, bool)
    return isinstance(value, option)


# ----------------------------------------------------------------------------------------------------------- messages


def _misfit(value: Any, hint: Any, where: str = "") -> str:
    lists = list_types(hint)
    parts = [option for option in options(hint) if option not in lists] or lists
    if isinstance(value, list) and any(typing.get_origin(option) is list for option in lists):
        wrong = [part for part in value if not _fits(part, hint)]
        if wrong and not isinstance(wrong[0], list):
            return _misfit(wrong[0], hint, " in a list")
    choices = [c for part in parts if typing.get_origin(part) is Literal for c in typing.get_args(part)]
    if choices and isinstance(value, str) and str not in parts and not reads_as_number(value):
        return not_a_choice(value, choices, [described(p) for p in parts if p in (int, float, bool)], where)
    expected = " or ".join(dict.fromkeys(described(part) for part in parts))
    advice = "change it"
    if isinstance(value, str) and reads_as_number(value) and {int, float} & {*parts}:
        advice = f"write {value.strip()} without quotes"
    if isinstance(value, list) and typing.get_origin(parts[0]) is not tuple:
        advice = f"give one value (lists are for {', '.join(LABELS)})"
    return f"found {value!r} ({type(value).__name__}){where}, expected {expected}; {advice}"


def not_a_choice(value: str, choices: Iterable[str], others: Iterable[str] = (), where: str = "") -> str:
    """Return what is wrong with a text that is none of the choices; `others` is what else fits."""
    choices = list(choices)
    guess = nearest(value, choices)
    advice = f"did you mean {guess!r}?" if guess else "choose one"
    return f"found {value!r}{where}, expected one of {', '.join([*others, *choices])}; {advice}"


def described(hint: Any) -> str:
    """Return a type in the words of messages."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        values = " or ".join(map(described, options(typing.get_args(hint)[1])))
        return f"a dict whose values are each {values}"
    if typing.get_origin(hint) is tuple:
        return "a list of numbers" if float in options(typing.get_args(hint)[0]) else "a list of whole numbers"
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    return names.get(hint, "None")


def reads_as_number(text: str) -> bool:
    """Return whether the text is a number: 32, 2e6, 2_000_000, -1, nan."""
    try:
        float(text)
    except ValueError:
        return False
    return True
