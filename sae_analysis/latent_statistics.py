"""Sums over a corpus from which the figures of each latent follow: how often it fires, and how strongly."""

from __future__ import annotations

from math import comb

import numpy as np

from sae_analysis.events import Firings, Floats64, arrays_of

BINS_PER_OCTAVE = 8  # so that a bin's edges are 9% apart
LOWEST_OCTAVE, N_OCTAVES = -16, 32
N_BINS = BINS_PER_OCTAVE * N_OCTAVES
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class Moments:
    """Sums of powers of each latent's activations, in float64.

    Such sums depend on their order. So each lane of passes (`sharing.py`) has its own, and they are added up in the
    order of the lanes, whichever processes have made the passes.
    """

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.lanes: dict[int, Floats64] = {}
        """(6, d_sae) each: how many activations, the first of them (`origin`), and the sums of their differences from
        it, of the squares of these, their cubes and fourth powers.

        Without the origin, moments of activations that are nearly the same would be differences of large numbers.
        """

    def add(self, firings: Firings, lane: int) -> None:
        if lane not in self.lanes:
            self.lanes[lane] = np.zeros((6, self.d_sae))
        fired, begins = firings.fired, firings.begins
        if len(fired) == 0:
            return
        count, origin, *power_sums = self.lanes[lane]
        counts = np.diff(firings.starts)[fired]
        values = firings.values.astype(np.float64)
        origin[fired] = np.where(count[fired] == 0, values[begins], origin[fired])
        count[fired] += counts
        differences = values - np.repeat(origin[fired], counts)
        powers = differences.copy()
        for sums in power_sums:
            sums[fired] += np.add.reduceat(powers, begins)
            powers *= differences

    def together(self) -> Floats64:
        """Return what a lane holds, of all lanes."""
        found = np.zeros((6, self.d_sae))
        for lane in sorted(self.lanes):
            found = added(found, self.lanes[lane])
        return found

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up lanes that another has."""
        for name, sums in arrays.items():
            own = self.lanes.get(int(name))
            self.lanes[int(name)] = sums if own is None else added(own, sums)

    def arrays(self) -> dict[str, np.ndarray]:
        return {str(lane): sums for lane, sums in self.lanes.items()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        self.lanes = {int(name): sums for name, sums in arrays.items()}


def added(one: Floats64, other: Floats64) -> Floats64:
    """Return the sums of two lanes as one, about the origin of the first where it has one."""
    origin = np.where(one[0] > 0, one[1], other[1])
    shift = other[1] - origin  # of the second's differences, which are then differences from the new origin
    of_powers = [other[0], *other[2:]]
    moved = [
        sum(comb(power, k) * shift ** (power - k) * of_powers[k] for k in range(power + 1))
        for power in range(1, len(of_powers))
    ]
    return np.stack([one[0] + other[0], origin, *(own + sums for own, sums in zip(one[2:], moved, strict=True))])


class LatentStatistics:
    """Counts of the firings of each latent, and where they are."""

    def __init__(self, d_sae: int, context_size: int) -> None:
        self.context_size = context_size
        self.n_counted = np.zeros((), dtype=np.int64)
        """Positions that count, whether a latent fires there or not."""
        self.count = np.zeros(d_sae, dtype=np.int64)
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
        self.count[fired] += counts
        self.max[fired] = np.maximum(self.max[fired], np.maximum.reduceat(firings.values, begins))
        places = firings.contexts * self.context_size + firings.positions
        self.first[fired] = np.where(self.first[fired] < 0, places[begins], self.first[fired])
        self.last[fired] = places[firings.starts[1:][fired] - 1]
        self.position_sum[fired] += np.add.reduceat(firings.positions, begins)
        bins = bins_of(firings.values.astype(np.float64))
        np.add.at(self.histogram.reshape(-1), firings.latents * N_BINS + bins, 1)

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up what another has counted in other contexts."""
        for name in ("n_counted", "count", "position_sum", "histogram"):
            getattr(self, name)[...] += arrays[name]
        np.maximum(self.max, arrays["max"], out=self.max)
        np.maximum(self.last, arrays["last"], out=self.last)
        theirs = arrays["first"]
        both = (self.first >= 0) & (theirs >= 0)
        self.first = np.where(both, np.minimum(self.first, theirs), np.maximum(self.first, theirs))

    def figures(self, moments: Moments) -> dict[str, np.ndarray]:
        """Return figures of each latent (d_sae,); NaN where it never fires.

        density: share of the counted positions where it fires. mean, variance, skew, kurtosis (3 for a normal
        distribution): of its activation where it fires; mean_all: over all counted positions. mean_position: within the
        context. first, last: as above.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            _, origin, *power_sums = moments.together()
            m1, m2, m3, m4 = np.stack(power_sums) / self.count
            variance = np.maximum(m2 - m1**2, 0)
            third = m3 - 3 * m1 * m2 + 2 * m1**3
            fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
            return {
                "count": self.count,
                "density": self.count / self.n_counted,
                "max": np.where(self.count > 0, self.max, np.nan),
                "mean": origin + m1,
                "mean_all": (power_sums[0] + self.count * origin) / self.n_counted,
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
