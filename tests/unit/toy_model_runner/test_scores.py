from __future__ import annotations

import itertools

import pytest
import torch

from sae_training.toy_model_runner.data import ToyModel, ToyModelGenerator, random_directions
from sae_training.toy_model_runner.scores import (
    FiringCounts,
    cosine_matrix,
    f1_scores,
    match_one_to_one,
    max_cosines,
    recovered_share,
)


def test_cosines_by_hand() -> None:
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    W_dec = torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.0, 0.0]])
    cosines = cosine_matrix(directions, W_dec)
    torch.testing.assert_close(cosines, torch.tensor([[0.6, 0.0, 0.0], [0.8, -1.0, 0.0]]))
    torch.testing.assert_close(max_cosines(cosines), torch.tensor([0.6, 0.8]))


def test_recovered_share_counts_features_at_the_limit() -> None:
    cosines = torch.tensor([[0.95, 0.2], [0.5, 0.89], [0.25, 0.1], [0.9, 0.9]])
    assert recovered_share(cosines, at_least=0.9) == 0.5
    assert recovered_share(cosines, at_least=0.25) == 1.0


@pytest.mark.parametrize(
    ("cosines", "expected"),
    [
        ([[0.9, 0.8], [0.7, 0.1]], [1, 0]),  # 0.8 + 0.7 is more than 0.9 + 0.1
        ([[0.9, 0.95, 0.0], [0.1, 0.94, 0.2]], [0, 1]),
        ([[0.3], [0.4], [-0.2]], [-1, 0, -1]),
        ([[-0.3, -0.4]], [0]),
    ],
)
def test_matching_by_hand(cosines: list[list[float]], expected: list[int]) -> None:
    assert match_one_to_one(torch.tensor(cosines)).tolist() == expected


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_matching_has_the_largest_sum_of_all_matchings(shape: tuple[int, int]) -> None:
    cosines = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matched = match_one_to_one(cosines)
    has_latent = matched >= 0
    assert has_latent.sum() == min(shape)
    assert len(matched[has_latent].unique()) == min(shape)
    found = cosines[has_latent, matched[has_latent]].sum().item()
    few, many = (cosines, shape[1]) if shape[0] < shape[1] else (cosines.T, shape[0])
    sums = [sum(few[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(many), min(shape))]
    assert found == pytest.approx(max(sums))


def test_f1_by_hand() -> None:
    f1 = f1_scores(torch.tensor([2, 0, 0]), torch.tensor([3, 2, 0]), torch.tensor([4, 0, 0]))
    assert f1[:2].tolist() == pytest.approx([4 / 7, 0])  # precision 1/2, recall 2/3
    assert f1[2].isnan()


def test_firing_counts_over_batches() -> None:
    # Feature 0 has latent 2, feature 1 has latent 0, feature 2 has none; latent 1 never fires.
    counts = FiringCounts(torch.tensor([2, 0, -1]), d_sae=3)
    counts.add(torch.tensor([[1.0, 0, 0], [2, 1, 0]]), torch.tensor([[0, 0, 0.5], [0, 0, 0.5]]))
    counts.add(torch.tensor([[0.0, 0, 1], [0, 0, 0]]), torch.tensor([[1.0, 0, 0.5], [0, 0, 0]]))
    assert counts.f1().tolist() == pytest.approx([2 * 2 / (2 + 3), 0, 0])
    assert counts.true_frequencies().tolist() == [0.5, 0.25, 0.25]
    assert counts.dead_fraction() == pytest.approx(1 / 3)


def test_perfect_dictionary_scores_one() -> None:
    model = ToyModel(random_directions(9, 5, seed=0), torch.full((9,), 0.2))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    cosines = cosine_matrix(model.directions, 3 * model.directions[order])
    assert max_cosines(cosines).mean().item() == pytest.approx(1)
    assert recovered_share(cosines) == 1
    matched = match_one_to_one(cosines)
    assert torch.equal(order[matched], torch.arange(9))
    _, acts = ToyModelGenerator(model, seed=1).next_batch(500)
    counts = FiringCounts(matched, d_sae=9)
    counts.add(acts, acts[:, order])
    assert counts.f1().tolist() == [1] * 9
    assert counts.dead_fraction() == 0
