"""The types of config fields: choices, ranges, and what a field means, all said in its annotation.

A type checker sees the plain types. At run time `checks` reads the marks:

    k: OneOrMany[Positive[int]] = 32                 values are checked against the range
    wandb_project: OnlyWatches[str] = "..."          a run may be continued with another value
    context_size: IdentifiesCache[int] = 128         a cache and the run that reads it must agree
    seqpos_slice: Slice = ()                         -1: and slice(-1, None) are (-1, None)
    multi_topk: Annotated[bool, OnlyIn("topk")]      refused, if changed, with another architecture
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")


class InProportion(int):
    """The value of a field that the user has left open: the run config works it out in proportion to the run.

    Once it is worked out it is still one of these, so that `dataclasses.replace` works it out anew. A plain int is what
    somebody has chosen, and stays.
    """


if TYPE_CHECKING:
    import torch

    # A built config holds a torch.dtype, whatever the user wrote.
    Dtype = torch.dtype
    # This is half of the truth: a config that describes several autoencoders holds lists, and only the single configs
    # that `sweep.variants` makes of it hold plain values. Nearly all code reads single configs, so the type checker is
    # told about these; code that may see lists asks `sweep.is_several` first.
    OneOrMany = Annotated[T, "or a list of them"]
else:
    Dtype = Literal["float32", "bfloat16", "float16", "float64"]
    OneOrMany = Union[T, list[T], tuple[T, ...]]  # noqa: UP007 - `|` cannot be subscripted


def torch_dtype(name: Any) -> Dtype:
    """Return the torch.dtype that `name`, the value of a Dtype field, stands for."""
    import torch  # not above: `--help` reads this file, and torch takes over a second

    return getattr(torch, name)


# ----------------------------------------------------------------------------------------------------------- choices

Architecture = Literal[
    "standard",
    "topk",
    "batchtopk",
    "jumprelu",
    "gated",
    "matryoshka",
    "abstopk",
    "normtopk",
    "groupmax",
    "matching_pursuit",
    "linear",
    "lineartopk",
]

ONLY_LOADED = ("abstopk", "normtopk", "groupmax", "matching_pursuit", "linear", "lineartopk")
"""Architectures of other programs' files, which are read and used, and not trained."""

MAY_BE_NEGATIVE = ("abstopk", "linear", "lineartopk")
"""Architectures whose activations may be below 0."""

SchedulerName = Literal[
    "constant",
    "constantwithwarmup",
    "linearwarmupdecay",
    "cosineannealing",
    "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
]

Normalization = Literal[
    "none", "expected_average_only_in", "layer_norm", "unit_norm", "layer_norm_unbiased", "constant_norm_rescale"
]

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]

FIXED_K = ("topk", "batchtopk", "matryoshka")
"""Architectures whose code is a fixed number of the largest pre-activations."""

WITH_K = (*FIXED_K, "abstopk", "normtopk", "groupmax", "lineartopk")
"""Architectures that have a k."""

HOOKS_WITH_HEADS = (
    "_z", "hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_result", "hook_attn_in", "hook_q_input",
    "hook_k_input", "hook_v_input",
)  # fmt: skip
"""Endings of hooks whose tensors are (..., heads, width of one)."""

UNKNOWN = "unknown"
"""The name of a model, a place or a text that an autoencoder's files do not give."""

WITH_PENALTY = ("standard", "jumprelu", "gated")
"""Architectures that are sparse by a penalty, times l1_coefficient."""

LABELS = {
    "hook_point": "",
    "hook_point_layer": "layer",
    "architecture": "",
    "expansion_factor": "x",
    "k": "k",
    "l1_coefficient": "l1-",
    "lr": "lr-",
    "lr_warm_up_steps": "warmup-",
    "seed": "seed",
}
"""The fields that may be lists, and what stands before the value in the name of an autoencoder."""

# ------------------------------------------------------------------------------------------------------------- marks


@dataclass(frozen=True)
class Limit:
    """Which values of the right type are accepted."""

    holds: Callable[[Any], bool]
    expected: str
    advice: str = "change it"
    choices: tuple[str, ...] = ()
    """Names to suggest the nearest of, in place of `expected` and `advice`."""


def at_least(bound: float) -> Limit:
    """Return the limit of numbers from `bound` on."""
    return Limit(lambda value: value >= bound, f"at least {bound}")


@dataclass(frozen=True)
class OnlyIn:
    """Marks a field that only these architectures have; elsewhere it would do nothing, or harm."""

    architectures: tuple[str, ...]

    def __init__(self, *architectures: str) -> None:
        object.__setattr__(self, "architectures", architectures)


WATCHES = "only watches or places a run: two runs that differ in nothing else train the same weights"

IDENTIFIES_CACHE = "decides which activations there are: a run that reads a cache must have the value of the cache"

DEVICES = ("cpu", "cuda", "mps", "xpu")


def names_device(value: str) -> bool:
    """Return whether the text is a device, perhaps with a number: cuda:1."""
    kind, colon, number = value.partition(":")
    return kind in DEVICES and (number.isdecimal() if colon else True)


Positive = Annotated[T, Limit(lambda value: value > 0, "more than 0")]
NotNegative = Annotated[T, Limit(lambda value: value >= 0, "0 or more")]
BelowOne = Annotated[T, Limit(lambda value: 0 <= value < 1, "at least 0 and less than 1")]
UpToOne = Annotated[T, Limit(lambda value: 0 < value <= 1, "more than 0 and at most 1")]
ZeroToOne = Annotated[T, Limit(lambda value: 0 <= value <= 1, "0 to 1")]
Text = Annotated[str, Limit(lambda value: bool(value.strip()), "some text", "give one or leave the field out")]
FolderName = Annotated[
    Text,
    Limit(
        lambda value: value not in (".", "..") and "\0" not in value and len(os.fsencode(value)) <= 200,
        "a name that a folder can have, of at most 200 bytes",
    ),
]
Device = Annotated[str, Limit(names_device, "a device", choices=DEVICES)]

Slice = tuple[int | None, ...]  # the only list with None, which may also be written as in Python: -1:

OnlyWatches = Annotated[T, WATCHES]
IdentifiesCache = Annotated[T, IDENTIFIES_CACHE]
