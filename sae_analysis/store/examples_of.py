"""Which examples of a latent are stored, of those that the corpus pass has kept."""

from __future__ import annotations

import numpy as np

from sae_analysis.events import ranges
from sae_analysis.examples import Kept
from sae_analysis.gathered import Gathered, Sizes
from sae_analysis.store.example_blob import KINDS, Stored

N_BANDS = 5


class Examples:
    """The examples of all latents; `contexts` are those that were given out by `of`."""

    def __init__(self, gathered: Gathered, sizes: Sizes) -> None:
        self.sizes, self.silences = sizes, gathered.silences
        self.strongest, self.sampled = gathered.strongest.kept(), gathered.sampled.kept()
        self.contexts: set[int] = set()

    def of(self, latent: int) -> Stored:
        begin, end = np.searchsorted(self.strongest.latents, [latent, latent + 1])
        parts = [self.taken(self.strongest, begin, end, "top")]
        begin, end = np.searchsorted(self.sampled.latents, [latent, latent + 1])
        middle = min(begin + self.sizes.random, end)
        parts += self.bands(middle, end)
        parts.append(self.taken(self.sampled, begin, middle, "random"))
        contexts, positions = self.silences.of(latent, self.sizes.silent)
        silent = np.full(len(contexts), KINDS.index("silent"))
        none = np.zeros(len(contexts), dtype=np.int64)
        parts.append(Stored(silent, contexts, positions, none, none[:0], np.zeros(0, dtype=np.float32)))
        stored = Stored(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        self.contexts.update(stored.contexts.tolist())
        return stored

    def bands(self, begin: int, end: int) -> list[Stored]:
        """Return the first few of each fifth of the sampled firings, by activation, the strongest fifth first."""
        places = np.arange(begin, end)
        strength = self.sampled.activations[begin:end]
        rank = np.empty(len(places), dtype=np.int64)
        rank[np.argsort(strength, kind="stable")] = np.arange(len(places))
        band = rank * N_BANDS // max(len(places), 1)
        found = []
        for number in reversed(range(N_BANDS)):
            some = places[band == number][: self.sizes.quantile]
            found += [self.taken(self.sampled, place, place + 1, f"quantile {number}") for place in some]
        return found

    def taken(self, kept: Kept, begin: int, end: int, kind: str) -> Stored:
        lengths = np.diff(kept.starts[begin : end + 1])
        places = ranges(kept.starts[begin:end], lengths)
        return Stored(
            np.full(end - begin, KINDS.index(kind)),
            kept.contexts[begin:end],
            kept.positions[begin:end],
            lengths,
            kept.firing_positions[places],
            kept.firing_values[places],
        )
