"""Every check of the run config, as one list of plain sentences.

`config.py` calls `plain_values` and then `problems` when a config is built. Nothing here imports
torch or touches a device, so that the command line can check before anything slow happens.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from sae_training.config.types import LABELS

if TYPE_CHECKING:
    pass

C = TypeVar("C")

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")

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

POSITIVE = (
    "d_in",
    "d_out",
    "expansion_factor",
    "k",
    "context_size",
    "train_batch_size",
    "store_batch_size",
    "n_batches_in_buffer",
    "total_training_tokens",
    "lr",
    "auxk_k",
    "feature_sampling_window",
    "dead_feature_window",
    "dead_feature_window_tokens",
    "n_restart_cycles",
    "clip_grad_norm",
    "grad_acc_steps",
    "micro_batch_size",
    "wandb_log_frequency",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "matryoshka_widths",
    "lp_norm",
    "target_l0",
    "jumprelu_bandwidth",
    "jumprelu_init_threshold",
    "jumprelu_tanh_scale",
    "layer_stride",
    "shard_size_mb",
    "dataset_weights",
)

NOT_NEGATIVE = (
    "hook_point_layer",
    "hook_point_head_index",
    "l1_coefficient",
    "l1_warm_up_steps",
    "k_anneal_steps",
    "auxk_coefficient",
    "dead_feature_threshold",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "lr_end",
    "eval_every_steps",
    "n_eval_batches",
    "n_checkpoints",
    "seed",
    "sequence_separator_token",
    "tokenizer_processes",
)

NOT_EMPTY = ("model_name", "hook_point", "target_hook_point", "dataset_path", "dataset_split", "run_dir", "run_name")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` was probably meant to be, or None."""
    folded = {known.lower().replace("-", "_"): known for known in names}
    wanted = ALIASES.get(name.lower(), name.lower()).replace("-", "_")
    if wanted in folded:
        return folded[wanted]
    matches = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    matches += [known for known in folded if len(wanted) > 2 and known.startswith(wanted)]
    return folded[matches[0]] if matches else None


def unknown_names(given: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """One line for each of `given` that is not in `known`, with the nearest known name."""
    known = list(known)
    lines = []
    for name in given:
        if name in known:
            continue
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else "see sae_training/config.py for the fields"
        lines.append(f"{name}: not a field of {what}; {hint}")
    return lines


def checked_names(cls: type[C]) -> type[C]:
    """Class decorator for a dataclass: unknown keywords answer with the nearest field."""
    original: Callable[..., None] = cls.__init__
    known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType] - a dataclass

    # wraps keeps the signature that editors, inspect and dataclasses.replace see
    @functools.wraps(original)
    def __init__(self: C, *args: object, **keywords: object) -> None:
        if lines := unknown_names(keywords, known, cls.__name__):
            raise TypeError("\n".join(lines))
        original(self, *args, **keywords)

    cls.__init__ = __init__
    return cls


def plain_values(cfg: Any) -> dict[str, Any]:
    """The fields as they are stored and checked: dtypes and devices by name, paths as text."""
    hints = field_types(type(cfg))
    return {f.name: plain_value(getattr(cfg, f.name), hints[f.name]) for f in fields(cfg)}


def refuse(cls: type[Any], found: list[str]) -> None:
    """ValueError with all the problems found, if there are any."""
    if found:
        noun = "problem" if len(found) == 1 else "problems"
        raise ValueError("\n".join([f"{cls.__name__}: {len(found)} {noun}", *found]))


def value_problems(values: Mapping[str, Any], cls: type[Any]) -> dict[str, str]:
    """What is wrong with each value by itself; `values` may hold only some of the fields."""
    found: dict[str, str] = {}
    for name, hint in field_types(cls).items():
        if name in values and (line := _problem(name, plain_value(values[name], hint), hint)):
            found[name] = line
    return found


@functools.cache
def field_types(cls: type[Any]) -> dict[str, Any]:
    """The annotation of each field, resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def is_union(hint: Any) -> bool:
    """Whether the annotation offers several types."""
    return typing.get_origin(hint) in (Union, types.UnionType)


def plain_value(value: Any, hint: Any) -> Any:
    """One value without torch, numpy and path types."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, range) or type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 1:
        value = list(value) if isinstance(value, range) else value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    if isinstance(value, float) and value.is_integer() and int in options and float not in options:
        return int(value)  # 2e6 tokens
    if isinstance(value, (list, tuple)):
        return tuple(value) if typing.get_origin(hint) is tuple else list(value)
    return value


def _problem(name: str, value: Any, hint: Any) -> str | None:
    if not _fits(value, hint):
        return _misfit(name, value, hint)
    if isinstance(value, list):
        return _problem_of_list(name, value, hint)
    if name == "dtype" and hint is str and value not in DTYPE_NAMES:
        return _not_a_choice(name, value, DTYPE_NAMES)
    if name == "device" and not re.fullmatch(rf"({'|'.join(DEVICE_TYPES)})(:\d+)?", value):
        return _not_a_choice(name, value, DEVICE_TYPES)
    if name in NOT_EMPTY and value is not None and not value.strip():
        return f"{name}: found {value!r}, expected some text; give one or leave the field out"
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            expected = _wrong_range(name, number)
            if expected:
                return f"{name}: found {number}, expected {expected}; change it"
    return None


def _problem_of_list(name: str, values: list[Any], hint: Any) -> str | None:
    if not values:
        return f"{name}: found an empty list, expected at least one value; give one or leave the field out"
    if "all" in values:
        return f"{name}: found {values}, expected numbers or the word all by itself; change it"
    if len(set(values)) < len(values):
        return f"{name}: found {values}, expected values that differ; leave the repeated ones out"
    return next(filter(None, (_problem(name, value, hint) for value in values)), None)


def _wrong_range(name: str, number: float) -> str | None:
    if not math.isfinite(number):
        return "a finite number"
    if name in POSITIVE and number <= 0:
        return "more than 0"
    if name in NOT_NEGATIVE and number < 0:
        return "0 or more"
    if name in ("adam_beta1", "adam_beta2", "ema_decay") and not 0 <= number < 1:
        return "at least 0 and less than 1"
    if name == "context_size" and number < 2:
        return "at least 2"
    if name == "max_activation_norm_multiple" and number < 1:
        return "at least 1"
    return None


def _fits(value: Any, hint: Any) -> bool:
    if is_union(hint):
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if origin in (list, tuple):
        element = typing.get_args(hint)[0]
        return type(value) is origin and all(_fits(part, element) for part in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _misfit(name: str, value: Any, hint: Any) -> str:
    parts = _parts(hint)
    takes_lists = any(typing.get_origin(part) is list for part in typing.get_args(hint))
    if isinstance(value, list) and takes_lists:
        wrong = [part for part in value if not any(_fits(part, single) for single in parts)]
        if wrong and not isinstance(wrong[0], list):
            return _misfit(name, wrong[0], hint).replace(", expected", " in a list, expected", 1)
    choices = [c for part in parts if typing.get_origin(part) is Literal for c in typing.get_args(part)]
    if choices and isinstance(value, str) and str not in parts and not reads_as_number(value):
        return _not_a_choice(name, value, choices, [_described(p) for p in parts if p in (int, float, bool)])
    expected = " or ".join(dict.fromkeys(_described(part) for part in parts))
    kind = type(value).__name__
    advice = "change it"
    if isinstance(value, str) and reads_as_number(value) and (int in parts or float in parts):
        advice = f"write {value.strip()} without quotes"
    if isinstance(value, list) and not any(typing.get_origin(part) is tuple for part in parts):
        advice = f"give one value (lists are for {', '.join(LABELS)})"
    return f"{name}: found {value!r} ({kind}), expected {expected}; {advice}"


def _not_a_choice(name: str, value: str, choices: Iterable[str], others: Iterable[str] = ()) -> str:
    choices = list(choices)
    guess = nearest(value, choices)
    expected = ", ".join([*others, *choices])
    if guess:
        return f"{name}: found {value!r}, expected one of {expected}; did you mean {guess!r}?"
    return f"{name}: found {value!r}, expected one of {expected}; choose one"


def _parts(hint: Any) -> list[Any]:
    """The single types that an annotation offers, without the lists of them."""
    if not is_union(hint):
        return [hint]
    return [p for p in typing.get_args(hint) if typing.get_origin(p) not in (list, tuple)]


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list of whole numbers" if typing.get_args(hint)[0] is int else "a list of numbers"
    if typing.get_origin(hint) is dict:
        return "values by name"
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    return names.get(hint, "None")


def reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
