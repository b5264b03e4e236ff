"""What stands in for the frozen language model where its activations are read from a disk, and no pass is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartsConfig:
    """The fields of a language model's `cfg` that are asked for without a pass."""

    d_vocab: int
    n_ctx: int
    dtype: torch.dtype
    """The precision of the passes."""


@dataclass(frozen=True)
class ModelParts:
    """A language model without its layers. Whatever would make a pass of it raises AttributeError."""

    cfg: PartsConfig
    tokenizer: Any | None
    fingerprint: str
    """That of the whole model (`load.fingerprint`)."""
    tensors: Mapping[str, Tensor]
    """Its unembedding, and what its neurons write (`unembedding.tensors_of`)."""
    median_norms: Mapping[str, float]
    """Of the activations at each hook, where the rule of positions needs it (`position_rule.median_norms`)."""
