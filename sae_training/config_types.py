"""Types of config fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union

T = TypeVar("T")
if TYPE_CHECKING:
    import torch

    # What every part after the config gets: a torch.dtype and single values, whatever the user
    # wrote.
    Dtype = torch.dtype
    OneOrMany = Annotated[T, "or a list of them"]
else:
    Dtype = str
    OneOrMany = Union[T, list[T], tuple[T, ...]]  # noqa: UP007 - `|` cannot be subscripted

Architecture = Literal["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"]
SchedulerName = Literal[
    "constant",
    "constantwithwarmup",
    "linearwarmupdecay",
    "cosineannealing",
    "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
]
PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]
