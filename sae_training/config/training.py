"""What this package reads from the files of other programs, and does not train.

A config that came from such files says so in `file_format` and may hold all of it. One that is to be trained may not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sae_training.config.fields import Origin
from sae_training.config.types import ONLY_LOADED, Architecture

DESCRIBES = ("file_format", "file_dtype")
"""Fields of Origin that only say where an autoencoder came from."""


def only_loaded(architecture: Architecture) -> str | None:
    """Refuse architectures that are only read from files."""
    if architecture not in ONLY_LOADED:
        return None
    return (
        f"architecture: found {architecture}, which is read from files and not trained; expected standard, topk, "
        "batchtopk, jumprelu, gated or matryoshka; choose one"
    )


def input_with_b_dec(apply_b_dec_to_input: bool) -> str | None:
    """Refuse an autoencoder whose input keeps the decoder's bias."""
    return unless_default("apply_b_dec_to_input", apply_b_dec_to_input)


def another_activation(activation_fn: str) -> str | None:
    """Refuse other activations than ReLU."""
    return unless_default("activation_fn", activation_fn)


def unless_default(name: str, value: Any) -> str | None:
    default = next(field.default for field in dataclasses.fields(Origin) if field.name == name)
    if value == default:
        return None
    return f"{name}: found {value!r}, which is read from files and not trained, expected {default!r}; leave it out"


def normalised_target(normalize_activations: str, target_hook_point: str | None) -> str | None:
    """Refuse to normalise a target row by row."""
    if target_hook_point is None or normalize_activations in ("none", "expected_average_only_in"):
        return None
    return (
        f"normalize_activations: found {normalize_activations} with target_hook_point {target_hook_point!r}, "
        "expected expected_average_only_in or none: the size of a target is not known where it is predicted"
    )


RULES = (only_loaded, input_with_b_dec, another_activation, normalised_target)
