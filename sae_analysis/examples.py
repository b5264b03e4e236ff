"""Examples of where a latent fires: its strongest, and a random sample; and contexts where it does not fire.

One pass over the corpus, in bounded memory. Of a context a latent has one example of a kind at most: the strongest
position for the first kind, a random one for the second. The sample is that of the smallest random numbers
(`events.priorities`), so neither batches nor a resumed build change it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sae_analysis.events import Firings, Floats, Ints, arrays_of, first_with, priorities, ranges

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


OF_EXAMPLES = ("contexts", "positions", "activations", "lengths", "firing_positions", "firing_values")


class BestOf:
    """The `n` examples of each latent with the smallest keys, first in the text among equals.

    Examples are numbered as they come, and what is known of them is kept in that order; a latent has the numbers of
    its own, best first.
    """

    def __init__(self, d_sae: int, n: int, key_type: type[np.generic]) -> None:
        self.n = n
        self.keys = np.full((d_sae, n), largest(key_type), dtype=key_type)
        self.numbers = np.full((d_sae, n), -1, dtype=np.int64)
        self.contexts = np.zeros(0, dtype=np.int64)
        self.positions = np.zeros(0, dtype=np.int32)
        self.activations = np.zeros(0, dtype=np.float32)
        self.lengths = np.zeros(0, dtype=np.int32)
        """How many firings an example's window has; they follow each other in the two arrays below."""
        self.firing_positions = np.zeros(0, dtype=np.int32)
        self.firing_values = np.zeros(0, dtype=np.float32)
        self.new: list[tuple[np.ndarray, ...]] = []
        """What will be appended to the last six."""
        self.n_examples = self.n_firings = self.n_compact = 0

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
        places = ranges(begins, lengths)
        self.new.append(
            (
                firings.contexts[chosen],
                firings.positions[chosen].astype(np.int32),
                firings.values[chosen],
                lengths.astype(np.int32),
                firings.positions[places].astype(np.int32),
                firings.values[places],
            )
        )
        self.place(firings.latents[chosen], keys[chosen], self.n_examples + np.arange(len(chosen)))
        self.n_examples += len(chosen)
        self.n_firings += len(places)
        if self.n_firings > 2 * self.n_compact + 2**20:
            self.compact()

    def place(self, latents: Ints, keys: np.ndarray, numbers: Ints) -> None:
        """Put new examples of ascending `latents` in their places among the known ones, and drop the worst."""
        rows, begins, counts = np.unique(latents, return_index=True, return_counts=True)
        row, column = np.repeat(np.arange(len(rows)), counts), np.arange(len(latents)) - np.repeat(begins, counts)
        wide = np.full((len(rows), counts.max()), largest(self.keys.dtype.type), dtype=self.keys.dtype)
        wide_numbers = np.full(wide.shape, -1, dtype=np.int64)
        wide[row, column], wide_numbers[row, column] = keys, numbers
        together = np.concatenate([self.keys[rows], wide], axis=1)
        order = np.argsort(together, axis=1, kind="stable")[:, : self.n]  # the known ones are earlier in the text
        self.keys[rows] = np.take_along_axis(together, order, axis=1)
        self.numbers[rows] = np.take_along_axis(
            np.concatenate([self.numbers[rows], wide_numbers], axis=1), order, axis=1
        )

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up the examples that another has found in other contexts."""
        self.join()
        theirs: Ints = np.where(arrays["numbers"] < 0, -1, arrays["numbers"] + len(self.contexts))
        self.new.append(tuple(arrays[name] for name in OF_EXAMPLES))
        self.join()
        keys = np.concatenate([self.keys, arrays["keys"]], axis=1)
        numbers = np.concatenate([self.numbers, theirs], axis=1)
        contexts = np.append(self.contexts, -1)[numbers]
        order = np.lexsort([contexts, keys], axis=1)[:, : self.n]
        self.keys = np.take_along_axis(keys, order, axis=1)
        self.numbers = np.take_along_axis(numbers, order, axis=1)
        self.compact()

    def compact(self) -> None:
        """Drop the examples that no latent has, and number the others by latent, best first."""
        self.join()
        there = self.numbers >= 0
        kept = self.numbers[there]
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        places = ranges(starts[kept], self.lengths[kept].astype(np.int64))
        self.contexts, self.positions = self.contexts[kept], self.positions[kept]
        self.activations, self.lengths = self.activations[kept], self.lengths[kept]
        self.firing_positions, self.firing_values = self.firing_positions[places], self.firing_values[places]
        self.numbers[there] = np.arange(len(kept))
        self.n_examples, self.n_firings, self.n_compact = len(kept), len(places), len(places)

    def join(self) -> None:
        parts = [tuple(getattr(self, name) for name in OF_EXAMPLES), *self.new]
        for name, part in zip(OF_EXAMPLES, zip(*parts, strict=True), strict=True):
            setattr(self, name, np.concatenate(part))
        self.new = []

    def kept(self) -> Kept:
        """Return all examples."""
        self.compact()
        latents, _ = np.nonzero(self.numbers >= 0)
        starts = np.append(0, np.cumsum(self.lengths, dtype=np.int64))
        positions = self.positions.astype(np.int64)
        return Kept(
            latents, self.contexts, positions, self.activations, starts, self.firing_positions, self.firing_values
        )

    def arrays(self) -> dict[str, np.ndarray]:
        self.join()
        return arrays_of(self)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        vars(self).update(arrays)
        self.n_examples, self.n_firings = len(self.contexts), len(self.firing_values)


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
        for i in np.flatnonzero(keep.any(axis=1) & (keys < self.keys.max())):
            worst = int(self.keys.argmax())
            if keys[i] >= self.keys[worst]:
                continue
            counted = np.flatnonzero(keep[i])
            here = firings.latents[firings.contexts == numbers[i]]
            fires = np.zeros(self.fires.shape[1], dtype=bool)
            fires[here] = True
            self.keys[worst], self.contexts[worst], self.fires[worst] = keys[i], numbers[i], fires
            self.positions[worst] = counted[int(keys[i] % np.uint64(len(counted)))]

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up the contexts that another has drawn from others."""
        best = np.argsort(np.concatenate([self.keys, arrays["keys"]]), kind="stable")[: self.n]
        for name, theirs in arrays.items():
            setattr(self, name, np.concatenate([getattr(self, name), theirs])[best])

    def examples(self, n: int) -> tuple[Ints, Ints, Ints]:
        """Return (latents, contexts, positions) of up to `n` contexts in which each latent does not fire.

        Each latent begins at another of the contexts, so that not all show the same ones.
        """
        d_sae = self.fires.shape[1]
        first = (priorities(self.seed, np.arange(d_sae)) % np.uint64(self.n)).astype(np.int32)
        order = np.argsort(self.keys)[(np.arange(self.n, dtype=np.int32)[:, None] + first) % self.n]
        is_silent = np.take_along_axis(~self.fires & (self.contexts >= 0)[:, None], order, axis=0)
        latents, ranks = np.nonzero((is_silent & (is_silent.cumsum(axis=0, dtype=np.int32) <= n)).T)
        places = order[ranks, latents]
        return latents, self.contexts[places], self.positions[places]

    def arrays(self) -> dict[str, np.ndarray]:
        return arrays_of(self)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        vars(self).update(arrays)


def largest(key_type: type[np.generic]) -> Any:
    """Return what every key is below."""
    return np.inf if issubclass(key_type, np.floating) else np.iinfo(key_type).max  # pyright: ignore


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
