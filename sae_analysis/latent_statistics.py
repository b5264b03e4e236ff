"""Sums over a corpus from which the figures of each latent follow: how often it fires, and how strongly."""

from __future__ import annotations

import numpy as np

from sae_analysis.events import Firings, arrays_of

BINS_PER_OCTAVE = 8  # so that a bin's edges are 9% apart
LOWEST_OCTAVE, N_OCTAVES = -16, 32
N_BINS = BINS_PER_OCTAVE * N_OCTAVES
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class LatentStatistics:
    """Sums over the firings of each latent."""

    def __init__(self, d_sae: int, context_size: int) -> None:
        self.context_size = context_size
        self.n_counted = np.zeros((), dtype=np.int64)
        """Positions that count, whether a latent fires there or not."""
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.origin = np.zeros(d_sae)
        """The first activation."""
        self.power_sums = np.zeros((4, d_sae))
        """Sums of activations less `origin`, of their squares, cubes and fourth powers.

        Without the origin, moments of activations that are nearly the same would be differences of large numbers.
        """
        self.max = np.zeros(d_sae, dtype=np.float32)
        self.first = np.full(d_sae, -1, dtype=np.int64)
        """Where in the corpus it fires first and last: context * context_size + position; -1 if nowhere."""
        self.last = np.full(d_sae, -1, dtype=np.int64)
        self.position_sum = np.zeros(d_sae, dtype=np.int64)
        self.histogram = np.zeros((d_sae, N_BINS), dtype=np.int64)

    def add(self, firings: Firings, n_counted: int) -> None:
        self.n_counted += n_counted
        fired, begins = firings.fired, firings.begins
        if len(fired) == 0:
            return
        counts = np.diff(firings.starts)[fired]
        values = firings.values.astype(np.float64)
        self.origin[fired] = np.where(self.count[fired] == 0, values[begins], self.origin[fired])
        self.count[fired] += counts
        differences = values - np.repeat(self.origin[fired], counts)
        powers = differences.copy()
        for sums in self.power_sums:
            sums[fired] += np.add.reduceat(powers, begins)
            powers *= differences
        self.max[fired] = np.maximum(self.max[fired], np.maximum.reduceat(firings.values, begins))
        places = firings.contexts * self.context_size + firings.positions
        self.first[fired] = np.where(self.first[fired] < 0, places[begins], self.first[fired])
        self.last[fired] = places[firings.starts[1:][fired] - 1]
        self.position_sum[fired] += np.add.reduceat(firings.positions, begins)
        np.add.at(self.histogram.reshape(-1), firings.latents * N_BINS + bins_of(values), 1)

    def figures(self) -> dict[str, np.ndarray]:
        """Return figures of each latent (d_sae,); NaN where it never fires.

        density: share of the counted positions where it fires. mean, variance, skew, kurtosis (3 for a normal
        distribution): of its activation where it fires; mean_all: over all counted positions. mean_position: within the
        context. first, last: as above.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            m1, m2, m3, m4 = self.power_sums / self.count
            variance = np.maximum(m2 - m1**2, 0)
            third = m3 - 3 * m1 * m2 + 2 * m1**3
            fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
            return {
                "count": self.count,
                "density": self.count / self.n_counted,
                "max": np.where(self.count > 0, self.max, np.nan),
                "mean": self.origin + m1,
                "mean_all": (self.power_sums[0] + self.count * self.origin) / self.n_counted,
                "variance": variance,
                "skew": np.where(variance > 0, third / variance**1.5, np.nan),
                "kurtosis": np.where(variance > 0, fourth / variance**2, np.nan),
                "first": self.first,
                "last": self.last,
                "mean_position": self.position_sum / self.count,
            }

    def quantiles(self) -> np.ndarray:
        """Return (len(QUANTILES), d_sae): the lower edge of the bin in which each quantile of the firings lies."""
        cumulated = self.histogram.cumsum(axis=1)
        found = []
        for quantile in QUANTILES:
            rank = np.ceil(quantile * self.count).clip(min=1)
            found.append(bin_edges()[(cumulated < rank[:, None]).sum(axis=1).clip(max=N_BINS - 1)])
        return np.where(self.count > 0, np.stack(found), np.nan)

    def arrays(self) -> dict[str, np.ndarray]:
        return arrays_of(self)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        vars(self).update(arrays)


def bins_of(values: np.ndarray) -> np.ndarray:
    """Return the bin of each activation: bin j begins at 2 ** (LOWEST_OCTAVE + j / BINS_PER_OCTAVE); ends are open."""
    return np.floor((np.log2(values) - LOWEST_OCTAVE) * BINS_PER_OCTAVE).astype(np.int64).clip(0, N_BINS - 1)


def bin_edges() -> np.ndarray:
    """Return the (N_BINS + 1,) edges."""
    return 2.0 ** (LOWEST_OCTAVE + np.arange(N_BINS + 1) / BINS_PER_OCTAVE)


def shown_histogram(counts: np.ndarray, n_bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return (counts, edges) of one latent's histogram, from its lowest to its highest bin, in at most `n_bins`."""
    (used,) = counts.nonzero()
    if len(used) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    low, high = used[0], used[-1] + 1
    width = -(-(high - low) // n_bins)
    starts = np.arange(low, high, width)
    ends = np.append(starts[1:], high)
    return np.add.reduceat(counts[:high], starts), bin_edges()[np.append(starts, ends[-1])]
