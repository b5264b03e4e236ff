"""Types of config fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union

import torch

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

FIXED_K = ("topk", "batchtopk", "matryoshka")

"""Architectures whose code is a fixed number of the largest pre-activations."""

WITH_PENALTY = ("standard", "jumprelu", "gated")

"""Architectures that are sparse by a penalty, times l1_coefficient."""

# Options that only some architectures have; elsewhere they would do nothing, or harm.
OPTION_OF: dict[str, tuple[str, ...]] = {
    "multi_topk": ("topk",),
    "matryoshka_widths": ("matryoshka",),
    "k_anneal_steps": FIXED_K,
    "lp_norm": ("standard", "gated"),
    "scale_sparsity_penalty_by_decoder_norm": ("standard", "gated", "jumprelu"),
    "target_l0": ("jumprelu",),
    "jumprelu_bandwidth": ("jumprelu",),
    "jumprelu_init_threshold": ("jumprelu",),
    "jumprelu_sparsity_loss_mode": ("jumprelu",),
    "jumprelu_tanh_scale": ("jumprelu",),
}
