from __future__ import annotations

import geom_median.torch
import torch

from sae_training.sparse_autoencoder.start_values import geometric_median


def test_geometric_median_agrees_with_the_geom_median_package() -> None:
    points = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 3
    points[:5] *= 50
    expected = geom_median.torch.compute_geometric_median(list(points), eps=1e-8, maxiter=200, ftol=1e-12).median
    torch.testing.assert_close(
        geometric_median(points, max_iterations=1000, tolerance=1e-9), expected, atol=1e-3, rtol=0
    )


def test_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    # The Fermat point of a triangle with a right angle and legs 1 is on the diagonal at (3 - sqrt(3)) / 6.
    at = (3 - 3**0.5) / 6
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    median = geometric_median(triangle, max_iterations=10_000, tolerance=0)
    torch.testing.assert_close(median, torch.tensor([at, at]), atol=1e-5, rtol=0)


def test_geometric_median_is_hardly_moved_by_a_row_of_huge_norm() -> None:
    points = torch.randn(999, 4, generator=torch.Generator().manual_seed(1))
    with_outlier = torch.cat([points, torch.full((1, 4), 1e6)])
    assert (geometric_median(with_outlier) - geometric_median(points)).norm() < 0.01
    assert with_outlier.mean(dim=0).norm() > 900


def test_geometric_median_of_equal_rows_is_that_row() -> None:
    points = torch.tensor([[2.0, -1.0]]).repeat(5, 1)
    assert torch.equal(geometric_median(points), torch.tensor([2.0, -1.0]))
