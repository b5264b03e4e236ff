"""The geometric median: the point with the smallest sum of distances to a set of points."""

from __future__ import annotations

import torch
from torch import Tensor


def centre(rows: Tensor, method: str) -> Tensor:
    """The centre (d,) of rows (n, d): "geometric_median", "mean", or "zeros" for none."""
    match method:
        case "geometric_median":
            return geometric_median(rows)
        case "mean":
            return rows.float().mean(dim=0)
        case "zeros":
            return torch.zeros_like(rows[0])
        case other:
            raise ValueError(f"b_dec_init_method: found {other!r}, expected 'geometric_median', 'mean' or 'zeros'.")


@torch.no_grad()
def geometric_median(points: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Geometric median of `points` (rows, d) as a (d,) float32 tensor, by Weiszfeld's iteration from the mean.

    Each step is the average of the points weighted by 1 / distance (Weiszfeld 1937). Distances are kept above 1e-6 of
    their median, so an estimate that lands on a point neither divides by zero nor sticks there. Stops when a step is
    shorter than `tolerance` times the median distance. Unlike the mean, a few rows of huge norm (a BOS position)
    hardly move it.
    """
    points = points.float()
    median = points.mean(dim=0)
    for _ in range(max_iterations):
        distances = (points - median).norm(dim=1)
        typical = distances.median()
        weights = 1 / distances.clamp_min(torch.clamp(1e-6 * typical, min=1e-30))
        previous, median = median, (weights @ points) / weights.sum()
        if (median - previous).norm() <= tolerance * typical:
            break
    return median
