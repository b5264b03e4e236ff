"""The normaliser of activations that forks of dictionary_learning (science-of-finetuning's) save with their weights.

A row x is read as (x - activation_mean) * activation_global_scale, and an output comes back by / (scale + 1e-8) + mean.
The scale is target_rms / sqrt(sum of activation_std ** 2 + 1e-8) of each place, or in older files of all places
together. A mean or a deviation that holds NaN stands for no normaliser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MEAN, STD, SCALE, RMS = "activation_mean", "activation_std", "activation_global_scale", "target_rms"
NAMES = (MEAN, STD, SCALE, RMS)

LEAST = 1e-8  # is added there to scales and to variances
AGREES = 0.01  # as a share; bfloat16 has three digits


@dataclass(frozen=True)
class Normaliser:
    """What rows of activations (..., d) are read and written by."""

    mean: Tensor
    """(places, d), or (d,) of an autoencoder."""
    scale: Tensor
    """(places,), or a scalar."""
    remarks: tuple[str, ...]


def check_normaliser(shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    """ValueError for tensors of a normaliser that do not fit activations of this shape, (places, d) or (d,).

    It looks at a stranger's shapes before their values are read.
    """
    fitting = {MEAN: (shape,), STD: (shape,), SCALE: ((), shape[:-1]), RMS: ((), (1,))}
    for name, allowed in fitting.items():
        if name in shapes and shapes[name] not in allowed:
            raise ValueError(f"{name}: found shape {shapes[name]}, expected {' or '.join(map(str, allowed))}.")


def normaliser_in(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Normaliser | None:
    """The normaliser of activations of this shape, (places, d) or (d,), in float32 at least; None if there is none.

    `tensors` are those of `NAMES` that a file holds, of shapes that fit. ValueError for a part of a normaliser, and for
    a scale that is no finite number above 0.
    """
    statistics = [name for name in (MEAN, STD) if name in tensors]
    if not statistics or any(tensors[name].isnan().any() for name in statistics):
        return None
    missing = [name for name in (MEAN, STD, SCALE) if name not in tensors]
    if missing:
        raise ValueError(
            f"{', '.join(statistics)} without {', '.join(missing)}, expected all of them, or none: activations were "
            "normalised in training, and these files do not say how; use a complete copy."
        )
    mean, std, scale = (tensors[name].double() for name in (MEAN, STD, SCALE))
    scale = scale.reshape(()) if scale.numel() == 1 else scale
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"{SCALE}: found {least_or_nan(scale):g}, expected finite numbers above 0; use another copy.")
    total = std.square().sum() if scale.ndim == 0 else std.square().sum(dim=-1)
    expected = tensors.get(RMS, torch.ones(())).double().reshape(()) / (total + LEAST).sqrt()
    told = () if torch.allclose(scale, expected, rtol=AGREES, atol=0) else (in_words(scale, expected),)
    float_as = torch.promote_types(tensors[MEAN].dtype, torch.float32)
    return Normaliser(mean.to(float_as), scale.to(float_as).expand(shape[:-1]), told)


def least_or_nan(scale: Tensor) -> float:
    """The value that is wrong with a scale, or one of them."""
    bad = scale[~((scale > 0) & scale.isfinite())]
    return float(bad.flatten()[0])


def in_words(scale: Tensor, expected: Tensor) -> str:
    values, others = (", ".join(f"{value:.4g}" for value in part.flatten()[:4].tolist()) for part in (scale, expected))
    return (
        f"{SCALE} is {values}, and {RMS} and {STD} give {others}: rows are multiplied by the former, as in its own "
        "program, but one of them is not what training used; compare with another copy"
    )
