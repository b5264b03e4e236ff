"""What a latent is close to: other latents by their directions, by where they fire, and neurons of the model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from sae_analysis.events import Ints, arrays_of, priorities, ranges
from sae_training.kernels.selection import highest
from sae_training.kernels.sparse_code import Code

MAX_ROWS = 65_536
MAX_PAIRS = 2**25
"""Pairs of latents on one row, added up over the rows: 0.8 GiB, if every pair is another one."""
CHUNK = 2**22  # pairs of latents that are compared at once


class Nearest(NamedTuple):
    """For each latent others and how near they are, (d_sae, n) each, nearest first; -1 and NaN where there are less."""

    others: Ints
    values: np.ndarray


class RowSample:
    """The codes of a random sample of a corpus' rows (`events.priorities`): all of them, if they are few."""

    def __init__(self, d_sae: int, seed: int, n: int = MAX_ROWS) -> None:
        self.d_sae, self.seed, self.n = d_sae, seed, n
        self.keys = np.zeros(0, dtype=np.uint64)
        self.sizes = np.zeros(0, dtype=np.int64)
        self.latents = np.zeros(0, dtype=np.int32)
        self.values = np.zeros(0, dtype=np.float32)
        self.limit = np.array(np.iinfo(np.uint64).max, dtype=np.uint64)
        self.new: list[tuple[np.ndarray, ...]] = []

    def add(self, code: Code, contexts: Ints, positions: Ints) -> None:
        """Add the rows of `code`, which are these contexts and positions (rows,)."""
        keys = priorities(self.seed, contexts, positions)
        chosen = keys < self.limit
        entries = code.at_entries
        kept = chosen[entries.rows.cpu().numpy()]
        sizes = entries.offsets.diff().cpu().numpy()[chosen]
        latents, values = entries.latents.cpu().numpy(), code.values.float().cpu().numpy()
        self.new.append((keys[chosen], sizes, latents[kept].astype(np.int32), values[kept]))
        if len(self.keys) + sum(len(part[0]) for part in self.new) > 2 * self.n:
            self.settle()

    def settle(self) -> None:
        """Keep the `n` rows with the smallest keys, in the order of these."""
        parts = [(self.keys, self.sizes, self.latents, self.values), *self.new]
        self.keys, self.sizes, self.latents, self.values = map(np.concatenate, zip(*parts, strict=True))
        self.new = []
        order = np.argsort(self.keys, kind="stable")[: self.n]
        self.latents, self.values = (part for part in take_rows(order, self.sizes, self.latents, self.values))
        self.keys, self.sizes = self.keys[order], self.sizes[order]
        if len(order) == self.n:
            self.limit[...] = self.keys[-1]

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up the sample that another has drawn from other rows."""
        self.new.append(tuple(arrays[name] for name in ("keys", "sizes", "latents", "values")))
        self.settle()

    def matrix(self) -> scipy.sparse.csr_array:
        """Return the codes (rows, d_sae) of so many of the rows that MAX_PAIRS are enough."""
        self.settle()
        n = int(np.searchsorted(np.cumsum(self.sizes**2), MAX_PAIRS, side="right"))
        starts = np.append(0, np.cumsum(self.sizes[:n]))
        values = self.values[: starts[-1]].astype(np.float64)
        return scipy.sparse.csr_array((values, self.latents[: starts[-1]], starts), shape=(n, self.d_sae))

    def arrays(self) -> dict[str, np.ndarray]:
        self.settle()
        return arrays_of(self)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        vars(self).update(arrays)


def take_rows(order: Ints, sizes: Ints, *parts: np.ndarray) -> list[np.ndarray]:
    """Return the entries of rows in another order; row i has sizes[i] entries, one after the other."""
    starts = np.cumsum(sizes) - sizes
    places = ranges(starts[order], sizes[order])
    return [part[places] for part in parts]


# --------------------------------------------------------------------------------------------------- by where they fire


def coactive(matrix: scipy.sparse.csr_array, n: int) -> Nearest:
    """Return the latents that fire most often together: rows where both do, over rows where either does (Jaccard)."""
    fires = matrix.copy()
    fires.data = np.ones_like(fires.data)
    both = products_of_columns(fires)
    counts = both.diagonal()
    either = np.repeat(counts, np.diff(both.indptr))
    either += counts[both.indices]
    either -= both.data
    both.data /= either
    return nearest_in_rows(both, n)


def correlated(matrix: scipy.sparse.csr_array, n: int) -> Nearest:
    """Return the latents with the highest Pearson correlation over the rows, of those that fire on a common row."""
    n_rows = len(matrix.indptr) - 1
    products = products_of_columns(matrix)
    means = np.asarray(matrix.sum(axis=0)).ravel() / max(n_rows, 1)
    deviations = np.sqrt(np.maximum(products.diagonal() / max(n_rows, 1) - means**2, 0))
    sizes, others = np.diff(products.indptr), products.indices
    with np.errstate(divide="ignore", invalid="ignore"):
        products.data /= n_rows
        products.data -= np.repeat(means, sizes) * means[others]
        products.data /= np.repeat(deviations, sizes) * deviations[others]
    return nearest_in_rows(products, n)


def products_of_columns(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return (d_sae, d_sae): the product of each two columns; the entries of a row are in no order."""
    return matrix.T.tocsr() @ matrix  # the product of `matrix.T` as it is would have to be turned over


def nearest_in_rows(matrix: scipy.sparse.csr_array, n: int) -> Nearest:
    """Return the `n` largest finite entries of each row of a square matrix, without those of the diagonal."""
    size = len(matrix.indptr) - 1
    found = Nearest(np.full((size, n), -1, dtype=np.int64), np.full((size, n), np.nan))
    for start in range(0, size, step := max(1, CHUNK // max(size, 1))):
        begins = matrix.indptr[start : start + step + 1]
        data: np.ndarray = matrix.data[begins[0] : begins[-1]]
        places = np.repeat(np.arange(len(begins) - 1) * size, np.diff(begins)) + matrix.indices[begins[0] : begins[-1]]
        dense = np.full((len(begins) - 1, size), -np.inf)
        dense.ravel()[places] = np.where(np.isfinite(data), data, -np.inf)
        np.fill_diagonal(dense[:, start:], -np.inf)
        others, values = (part.numpy() for part in highest(torch.from_numpy(dense), min(n, size)))
        there = np.isfinite(values)
        found.others[start : start + step, : there.shape[1]] = np.where(there, others, -1)
        found.values[start : start + step, : there.shape[1]] = np.where(there, values, np.nan)
    return found


# --------------------------------------------------------------------------------------------------------- by direction


@torch.no_grad()
def most_similar(directions: Tensor, n: int, among: Tensor | None = None) -> Nearest:
    """Return which of `among` (m, d) each of `directions` (d_sae, d) has the largest cosine with.

    None: which of the other directions. Cosines with a direction of zeros are 0.
    """
    unit = torch.nn.functional.normalize(directions, dim=1)
    table = unit if among is None else torch.nn.functional.normalize(among, dim=1)
    n = max(0, min(n, len(table) - (among is None)))
    # Filled in place: small results between the large products would keep the allocator from using memory again.
    found = Nearest(np.empty((len(unit), n), dtype=np.int64), np.empty((len(unit), n)))
    for start in range(0, len(unit), rows := max(1, CHUNK // max(1, len(table)))):
        cosines = unit[start : start + rows] @ table.T
        if among is None:
            own = torch.arange(len(cosines), device=cosines.device)
            cosines[own, own + start] = -torch.inf
        others, values = highest(cosines, n)
        found.others[start : start + rows], found.values[start : start + rows] = others.cpu(), values.cpu()
    return found
