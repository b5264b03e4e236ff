"""Which examples of the latents are stored, of those that the corpus pass has kept."""

from __future__ import annotations

import numpy as np

from sae_analysis.events import Ints, ranges, ranks
from sae_analysis.examples import Kept
from sae_analysis.gathered import Gathered, Sizes
from sae_analysis.store.example_blob import KINDS, Stored

N_BANDS = 5
TOP, RANDOM, SILENT = (KINDS.index(name) for name in ("top", "random", "silent"))


class Examples:
    """The examples of all latents, ordered by latent and by kind; (n,) arrays."""

    def __init__(self, gathered: Gathered, sizes: Sizes) -> None:
        strongest, sampled = gathered.strongest.kept(), gathered.sampled.kept()
        place, kind = chosen_of(sampled, sizes)
        silent_latents, contexts, positions = gathered.silences.examples(sizes.silent)
        latents = np.concatenate([strongest.latents, sampled.latents[place], silent_latents])
        of_top, of_silent = np.full(len(strongest.latents), TOP), np.full(len(silent_latents), SILENT)
        kinds = np.concatenate([of_top, kind, of_silent])
        order = np.lexsort([kinds, latents])
        none = np.zeros(len(silent_latents), dtype=np.int64)
        begins = np.concatenate([strongest.starts[:-1], len(strongest.firing_values) + sampled.starts[place], none])
        lengths = np.concatenate([np.diff(strongest.starts), np.diff(sampled.starts)[place], none])
        self.latents, self.kinds, self.begins, self.lengths = (x[order] for x in (latents, kinds, begins, lengths))
        self.contexts = np.concatenate([strongest.contexts, sampled.contexts[place], contexts])[order]
        self.positions = np.concatenate([strongest.positions, sampled.positions[place], positions])[order]
        self.firing_positions = np.concatenate([strongest.firing_positions, sampled.firing_positions])
        self.firing_values = np.concatenate([strongest.firing_values, sampled.firing_values])

    def of(self, some: range) -> list[Stored]:
        """Return the examples of each of some latents."""
        bounds = np.searchsorted(self.latents, np.arange(some.start, some.stop + 1))
        part = slice(bounds[0], bounds[-1])
        lengths = self.lengths[part]
        firings = ranges(self.begins[part], lengths)
        positions, values = self.firing_positions[firings], self.firing_values[firings]
        kinds, contexts, places = (x[part] for x in (self.kinds, self.contexts, self.positions))
        bounds -= bounds[0]
        of_firings = np.append(0, np.cumsum(lengths))[bounds]
        return [
            Stored(kinds[a:b], contexts[a:b], places[a:b], lengths[a:b], positions[c:d], values[c:d])
            for a, b, c, d in zip(bounds[:-1], bounds[1:], of_firings[:-1], of_firings[1:], strict=True)
        ]


def chosen_of(sampled: Kept, sizes: Sizes) -> tuple[Ints, Ints]:
    """Return the places in the sample, and kinds, of a latent's random examples and of those of its bands.

    The first few are the random ones. Of the others, the first few of each fifth by activation.
    """
    rank = ranks(sampled.latents)
    (others,) = np.nonzero(rank >= sizes.random)
    latents = sampled.latents[others]
    by_strength = np.lexsort([sampled.activations[others], latents])
    strength = np.empty(len(others), dtype=np.int64)
    strength[by_strength] = ranks(latents)
    band = strength * N_BANDS // np.bincount(latents, minlength=1)[latents]
    kinds = TOP + N_BANDS - band  # the strongest band comes after the top
    order = np.lexsort([kinds, latents])
    kept = order[ranks((latents * len(KINDS) + kinds)[order]) < sizes.quantile]
    (random,) = np.nonzero(rank < sizes.random)
    return np.concatenate([random, others[kept]]), np.concatenate([np.full(len(random), RANDOM), kinds[kept]])
