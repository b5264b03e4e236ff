"""The rows of a batch that this process computes, where several processes train the same weights on it.

Row i of a batch is computed by rank i % n. Rows are shuffled, so the ranks have the same work, and each has its part of
the first rows too, which are all that AuxK looks at. A mean over the rows of a batch is a sum over the ranks. One
process alone has all rows, and everything here is the identity.
"""

from __future__ import annotations

from torch import Tensor

from sae_training.parallel.peers import Peers


class Share(Peers):
    """Every n-th row of a batch, from the `rank`-th."""

    def of(self, rows: Tensor) -> Tensor:
        """Return this process's rows of `rows` (n_rows, ...)."""
        return rows if self.is_all else rows[self.rank :: self.n].contiguous()

    def count(self, n_rows: int) -> int:
        """Return how many of the first `n_rows` rows are this process's."""
        return len(range(self.rank, n_rows, self.n))

    def weight(self, n_rows: int) -> float:
        """Return which part of `n_rows` rows is this process's: the weight of its mean in the mean of all rows."""
        return self.count(n_rows) / n_rows

    def mean(self, of_own: Tensor, n_rows: int) -> Tensor:
        """Return the mean over all of `n_rows` rows from the mean over this process's, without gradient."""
        return of_own if self.is_all else self.summed(of_own.detach() * self.weight(n_rows))


ALONE = Share()
