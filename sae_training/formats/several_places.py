"""What families of crosscoders and cross-layer transcoders share: the values of their configs, and exact rewriting.

Their tensors are called as in `sparse_autoencoder.crosscoder`: W_enc.<set>.<j> is of the j-th place that a set reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.config.types import UNKNOWN
from sae_training.formats.loaded import Given, Loaded

Tensors = dict[str, Tensor]
Sets = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""For each set of latents the places that it reads and those that it writes."""

MOST_PLACES = 1000  # the deepest language models have 126 layers; sets of all later places grow with the square

CROSSCODER, CROSS_LAYER = "crosscoder", "cross_layer_transcoder"


def loaded_crosscoder(
    given: Given, values: dict[str, Any], weights: Callable[[], Tensors], remarks: Iterable[str] = (), **more: Any
) -> Loaded:
    """A crosscoder: `values` are the fields of CrosscoderConfig, but for those that are the same in all families."""
    values = {
        **values,
        "model_name": given.model_name or values.get("model_name") or UNKNOWN,
        "dataset_path": given.dataset_path or UNKNOWN,
    }
    return Loaded(values, weights, tuple(remarks), is_crosscoder=True, **more)


def numbered(n: int) -> tuple[str, ...]:
    """Names of places that the files do not name."""
    return tuple(map(str, range(n)))


def all_to_all(n_read: int, n_written: int) -> Sets:
    """One set, which reads and writes all places."""
    return ((tuple(range(n_read)), tuple(range(n_written))),)


def all_to_each(n_read: int, n_written: int) -> Sets:
    """A set for each place written, all of which read all places."""
    return tuple((tuple(range(n_read)), (place,)) for place in range(n_written))


def each_to_all(n: int) -> Sets:
    """A set for each place, which reads it and writes all."""
    return tuple(((place,), tuple(range(n))) for place in range(n))


def each_to_later(n: int) -> Sets:
    """A set for each place, which reads it, and writes it and all after it."""
    return tuple(((place,), tuple(range(place, n))) for place in range(n))


def files_by_number(names: Iterable[str], pattern: re.Pattern[str], folder: Path) -> list[str]:
    """The files that the pattern names by numbers, in order. ValueError unless they are 0, 1, ... without a gap."""
    found = {int(matched[1]): name for name in names if (matched := pattern.fullmatch(name))}
    missing = [number for number in range(len(found)) if number not in found]
    if missing:
        raise ValueError(
            f"{folder}: files {', '.join(sorted(found.values())[:8])}, of which number {missing[0]} is missing; use "
            "the whole folder."
        )
    return [found[number] for number in range(len(found))]


def check_sizes(where: Path, n_places: int, *sizes: int) -> None:
    """ValueError for more places than any model has, and for sizes that are no whole numbers from 1 on."""
    if not 1 <= n_places <= MOST_PLACES:
        raise ValueError(f"{where}: found {n_places:,} places, expected 1 to {MOST_PLACES:,}; check the file.")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{where}: found sizes {sizes}, expected whole numbers from 1 on; check the file.")


def check_shapes(where: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """ValueError, with all of them, for tensors that are missing, unknown or of another shape."""
    lines = [f"{name} missing" for name in expected if name not in found]
    lines += [f"{name} is no tensor of this format" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            lines.append(f"{name}: found shape {found[name]}, expected {expected[name]}")
    if lines:
        raise ValueError(f"{where}: {'; '.join(sorted(lines)[:8])}; use another copy.")


# ------------------------------------------------------------------------------------------------------------- folding


@torch.no_grad()
def scale_places(tensors: Tensors, values: dict[str, Any], s_in: Sequence[float], s_out: Sequence[float]) -> None:
    """For a program that gives s_in[r] * x_r of each place to these weights, and divides their outputs by s_out[w]."""
    latents: Sets = values["latents"]
    for number, (reads, _) in enumerate(latents[:1] if values.get("shares_encoder") else latents):
        for j, place in enumerate(reads):
            tensors[f"W_enc.{number}.{j}"].mul_(s_in[place])
    for number, (_, writes) in enumerate(latents):
        for j, place in enumerate(writes):
            tensors[f"W_dec.{number}.{j}"].div_(s_out[place])
    for place, factor in enumerate(s_out):
        tensors["b_dec"][place].div_(factor)
        if "W_skip" in tensors:
            tensors["W_skip"][place].mul_(s_in[place] / factor)


@torch.no_grad()
def decoder_norms(tensors: Tensors, n_sets: int) -> Tensor:
    """The norms (sets, d_sae) of latents' decoder rows, over all places that the set writes."""
    squares = []
    for number in range(n_sets):
        parts = [W for name, W in tensors.items() if name.startswith(f"W_dec.{number}.")]
        squares.append(torch.stack([W.norm(dim=1).square() for W in parts]).sum(dim=0))
    return torch.stack(squares).sqrt()


@torch.no_grad()
def thresholds(threshold: Tensor, norms: Tensor) -> Tensor:
    """Thresholds (sets, d_sae) of pre-activations, for a program that compares relu(pre) * norms with `threshold`.

    Below 0 they let all that is above 0 through. A latent whose decoder rows are zero exceeds none from 0 on: inf.
    """
    divided = threshold / torch.where(norms > 0, norms, 1.0)
    return torch.where((norms > 0) | (threshold < 0), divided, torch.inf).clamp_min(0)
