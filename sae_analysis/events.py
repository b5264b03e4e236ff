"""Firings of latents in some contexts of a corpus: the one form in which all statistics take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sae_training.kernels.sparse_code import Code

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Floats64 = NDArray[np.float64]


@dataclass(frozen=True)
class Firings:
    """The firings in contexts `first`, `first` + 1, ... of a corpus, ordered by latent, context and position.

    All arrays but the last two are (n,), one value for each firing.
    """

    latents: Ints
    contexts: Ints
    positions: Ints
    values: Floats
    starts: Ints
    """(d_sae + 1,): latent i has the firings starts[i] to starts[i + 1]."""
    tokens: Ints
    """(contexts, positions): the token ids; below 0 for padding."""
    first: int

    @cached_property
    def fired(self) -> Ints:
        """The latents that fire here, ascending."""
        return np.flatnonzero(np.diff(self.starts))

    @cached_property
    def begins(self) -> Ints:
        """Where the firings of each of `fired` begin."""
        return self.starts[:-1][self.fired]

    @cached_property
    def ids(self) -> Ints:
        """The token at each firing."""
        return self.tokens[self.contexts - self.first, self.positions]

    @cached_property
    def ids_before(self) -> Ints:
        """The token before each firing; -1 at the start of a context."""
        before = self.tokens[self.contexts - self.first, np.maximum(self.positions - 1, 0)]
        return np.where(self.positions == 0, -1, before)

    @cached_property
    def groups(self) -> Ints:
        """Where the firings of each pair of a latent and a context begin, and their number at the end."""
        is_new = np.ones(len(self.latents) + 1, dtype=bool)
        is_new[1:-1] = (np.diff(self.latents) != 0) | (np.diff(self.contexts) != 0)
        return np.flatnonzero(is_new) if len(self.latents) else np.zeros(1, dtype=np.int64)


def firings(code: Code, tokens: Tensor, keep: Tensor, first: int) -> Firings:
    """Return the firings of a `code` whose rows are the positions of `tokens` (contexts, positions) where `keep` is."""
    by_latent = code.at_entries.by_latent
    places = keep.flatten().nonzero().flatten().cpu()[by_latent.rows.cpu()].numpy()
    contexts, positions = np.divmod(places, tokens.shape[1])
    return Firings(
        by_latent.latents.cpu().numpy(),
        contexts + first,
        positions,
        code.values[by_latent.order].float().cpu().numpy(),
        by_latent.offsets.cpu().numpy(),
        tokens.cpu().numpy(),
        first,
    )


def priorities(seed: int, *numbers: Ints) -> NDArray[np.uint64]:
    """Return a random number for each row of `numbers`, always the same for the same seed and row.

    Those with the smallest numbers are a random sample, which depends neither on the order nor on the batches in which
    they come. Mixed as in splitmix64 (Steele et al. 2014).
    """
    mixed = np.full(numbers[0].shape, seed, dtype=np.uint64)
    for number in numbers:
        mixed = mixed + number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def arrays_of(accumulator: object) -> dict[str, NDArray[Any]]:
    """Return the arrays that an accumulator holds, which are all of its state."""
    return {name: value for name, value in vars(accumulator).items() if isinstance(value, np.ndarray)}


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """Return begins[0], begins[0] + 1, ... (lengths[0] of them), begins[1], ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - lengths), lengths)


def ranks(keys: Ints) -> Ints:
    """Return the place of each of the ascending `keys` among those that are equal to it."""
    return np.arange(len(keys)) - np.searchsorted(keys, keys)


def first_with(keys: np.ndarray, lowest: np.ndarray, groups: Ints) -> Ints:
    """Return for each group the first place where `keys` is what `lowest` says of the group."""
    sizes = np.diff(groups)
    hits = np.flatnonzero(keys == np.repeat(lowest, sizes))
    group = np.repeat(np.arange(len(sizes)), sizes)[hits]
    return hits[np.flatnonzero(np.append(True, np.diff(group) != 0))]
