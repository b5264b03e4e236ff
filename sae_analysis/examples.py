"""Examples of where a latent fires: its strongest, and a random sample; and contexts where it does not fire.

One pass over the corpus, in bounded memory. Of a context a latent has one example of a kind at most: the strongest
position for the first kind, a random one for the second. The sample is that of the smallest random numbers
(`events.priorities`), so neither batches nor a resumed build change it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sae_analysis.events import Firings, Floats, Ints, arrays_of, priorities, ranges

WINDOW = 128  # tokens before and after an example, in which the latent's other firings are kept


class Kept(NamedTuple):
    """Examples of latents, (n,) each, ordered by latent and then best first; and the firings in their windows."""

    latents: Ints
    contexts: Ints
    positions: Ints
    activations: Floats
    starts: Ints
    """(n + 1,): example i has the firings starts[i] to starts[i + 1] of the two arrays below."""
    firing_positions: np.ndarray
    firing_values: np.ndarray


class BestOf:
    """The `n` examples of each latent with the smallest keys, first in the text among equals.

    Examples come in the order of the text, as (n_new,) latents (ascending), keys, contexts and positions.
    """

    def __init__(self, d_sae: int, n: int, key_type: type[np.generic]) -> None:
        self.n = n
        self.keys = np.full((d_sae, n), largest(key_type), dtype=key_type)
        self.contexts = np.full((d_sae, n), -1, dtype=np.int64)
        self.positions = np.zeros((d_sae, n), dtype=np.int32)
        self.activations = np.zeros((d_sae, n), dtype=np.float32)
        self.slots = np.zeros((d_sae, n), dtype=np.int64)
        """Where the firings of an example's window begin in the two arrays below."""
        self.lengths = np.zeros((d_sae, n), dtype=np.int32)
        self.firing_positions = np.zeros(0, dtype=np.int32)
        self.firing_values = np.zeros(0, dtype=np.float32)
        self.new: list[tuple[np.ndarray, np.ndarray]] = []
        """What will be appended to the two arrays."""
        self.n_firings = 0

    def add(self, firings: Firings, keys: np.ndarray) -> None:
        """Take up the firings with the smallest `keys` (one for each firing), one of a context."""
        groups = firings.groups[:-1]
        if len(groups) == 0:
            return
        lowest = np.minimum.reduceat(keys, groups)
        # Most of a long corpus stops here, because better examples are known.
        good = np.flatnonzero(lowest < self.keys[firings.latents[groups], -1])
        if len(good) == 0:
            return
        chosen = first_with(keys, lowest, firings.groups)[good]
        begins, lengths = windows(firings, good, chosen)
        slots = self.append(firings, begins, lengths)
        others = (firings.contexts[chosen], firings.positions[chosen], firings.values[chosen], slots, lengths)
        self.merge(firings.latents[chosen], keys[chosen], *others)
        if self.n_firings > 2 * self.lengths.sum() + 2**20:
            self.compact()

    def append(self, firings: Firings, begins: Ints, lengths: Ints) -> Ints:
        """Keep the firings begins[i] to begins[i] + lengths[i] of each new example, and return where they begin."""
        places = ranges(begins, lengths)
        slots = self.n_firings + np.cumsum(lengths) - lengths
        self.new.append((firings.positions[places].astype(np.int32), firings.values[places]))
        self.n_firings += len(places)
        return slots

    def merge(self, latents: Ints, keys: np.ndarray, *others: np.ndarray) -> None:
        """Put new examples in their places among the kept ones, and drop the worst."""
        rows, begins, counts = np.unique(latents, return_index=True, return_counts=True)
        column = np.arange(len(latents)) - np.repeat(begins, counts)
        row = np.repeat(np.arange(len(rows)), counts)
        kept = (self.keys, self.contexts, self.positions, self.activations, self.slots, self.lengths)
        order = None
        for values, new in zip(kept, (keys, *others), strict=True):
            empty = largest(values.dtype.type) if values is self.keys else 0
            wide = np.full((len(rows), counts.max()), empty, dtype=values.dtype)
            wide[row, column] = new
            together = np.concatenate([values[rows], wide], axis=1)
            if order is None:  # by the keys, which come first; the known ones are earlier in the text
                order = np.argsort(together, axis=1, kind="stable")[:, : self.n]
            values[rows] = np.take_along_axis(together, order, axis=1)

    def compact(self) -> None:
        """Drop the firings of examples that are no longer kept."""
        self.join()
        lengths = np.where(self.contexts >= 0, self.lengths, 0).reshape(-1).astype(np.int64)
        places = ranges(self.slots.reshape(-1), lengths)
        self.firing_positions, self.firing_values = self.firing_positions[places], self.firing_values[places]
        self.n_firings = len(places)
        self.slots = (np.cumsum(lengths) - lengths).reshape(self.slots.shape)

    def join(self) -> None:
        parts = [(self.firing_positions, self.firing_values), *self.new]
        self.firing_positions, self.firing_values = map(np.concatenate, zip(*parts, strict=True))
        self.new = []

    def kept(self) -> Kept:
        """Return all examples."""
        self.compact()
        latents, ranks = np.nonzero(self.contexts >= 0)
        lengths = self.lengths[latents, ranks].astype(np.int64)
        starts = np.append(0, np.cumsum(lengths))
        contexts, positions = self.contexts[latents, ranks], self.positions[latents, ranks].astype(np.int64)
        activations = self.activations[latents, ranks]
        return Kept(latents, contexts, positions, activations, starts, self.firing_positions, self.firing_values)

    def arrays(self) -> dict[str, np.ndarray]:
        self.join()
        return arrays_of(self)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        vars(self).update(arrays)
        self.n_firings = len(self.firing_values)


class Silences:
    """Random contexts of the corpus, and which latents fire in each."""

    def __init__(self, d_sae: int, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self.keys = np.full(n, np.iinfo(np.uint64).max, dtype=np.uint64)
        self.contexts = np.full(n, -1, dtype=np.int64)
        self.positions = np.zeros(n, dtype=np.int64)
        self.fires = np.ones((n, d_sae), dtype=bool)

    def add(self, firings: Firings, keep: np.ndarray) -> None:
        """`keep` (contexts, positions): the positions that count, of which one stands for the context."""
        numbers = np.arange(len(keep)) + firings.first
        keys = priorities(self.seed, numbers)
        for i in np.flatnonzero(keep.any(axis=1) & (keys < self.keys[-1])):
            if keys[i] >= self.keys[-1]:
                continue
            counted = np.flatnonzero(keep[i])
            here = firings.latents[firings.contexts == numbers[i]]
            fires = np.zeros(self.fires.shape[1], dtype=bool)
            fires[here] = True
            at = int(np.searchsorted(self.keys, keys[i]))
            new = (keys[i], numbers[i], counted[int(keys[i] % np.uint64(len(counted)))], fires)
            for values, value in zip((self.keys, self.contexts, self.positions, self.fires), new, strict=True):
                values[at + 1 :] = values[at:-1].copy()
                values[at] = value

    def of(self, latent: int, n: int) -> tuple[Ints, Ints]:
        """Return (contexts, positions) of up to `n` contexts in which the latent does not fire."""
        found = np.flatnonzero(~self.fires[:, latent] & (self.contexts >= 0))[:n]
        return self.contexts[found], self.positions[found]

    def arrays(self) -> dict[str, np.ndarray]:
        return arrays_of(self)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        vars(self).update(arrays)


def largest(key_type: type[np.generic]) -> Any:
    """Return what every key is below."""
    return np.inf if issubclass(key_type, np.floating) else np.iinfo(key_type).max  # pyright: ignore


def first_with(keys: np.ndarray, lowest: np.ndarray, groups: Ints) -> Ints:
    """Return for each group the first place where `keys` is the group's lowest."""
    sizes = np.diff(groups)
    hits = np.flatnonzero(keys == np.repeat(lowest, sizes))
    group = np.repeat(np.arange(len(sizes)), sizes)[hits]
    return hits[np.flatnonzero(np.append(True, np.diff(group) != 0))]


def windows(firings: Firings, groups: Ints, chosen: Ints) -> tuple[Ints, Ints]:
    """Return (begins, lengths) of the firings within WINDOW tokens of the `chosen` one, for some groups."""
    begins, ends = firings.groups[groups], firings.groups[groups + 1]
    if firings.tokens.shape[1] <= WINDOW:
        return begins, ends - begins
    # Firings are ordered by latent, context and position: one number says where a window begins or ends.
    size = 4 * firings.tokens.shape[1]
    group_of = np.repeat(np.arange(len(firings.groups) - 1), np.diff(firings.groups))
    places = group_of * size + firings.positions
    middle = groups * size + firings.positions[chosen]
    low = np.maximum(np.searchsorted(places, middle - WINDOW), begins)
    high = np.minimum(np.searchsorted(places, middle + WINDOW, side="right"), ends)
    return low, high - low
