from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_training.toy_model_runner.data import (
    ToyModel,
    ToyModelGenerator,
    random_directions,
    scaled_to_sum,
    zipf_weights,
)

ROWS = 40_000


def make_model(probabilities: list[float], d_in: int = 4, **options: Any) -> ToyModel:
    return ToyModel(random_directions(len(probabilities), d_in, seed=0), torch.tensor(probabilities), **options)


def draw(model: ToyModel, rows: int = ROWS, seed: int = 1) -> tuple[Tensor, Tensor]:
    return ToyModelGenerator(model, seed).next_batch(rows)


def check_share(fires: Tensor, probability: float) -> None:
    """Within five standard errors of the binomial."""
    error = math.sqrt(probability * (1 - probability) / len(fires))
    assert fires.double().mean().item() == pytest.approx(probability, abs=5 * error)


# ------------------------------------------------------------------------------------------------------ the dictionary


@pytest.mark.parametrize("max_cosine", [None, 0.45])
def test_directions_have_unit_norm(max_cosine: float | None) -> None:
    directions = random_directions(32, 12, seed=0, max_cosine=max_cosine)
    assert directions.shape == (32, 12)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(32))


def test_directions_are_spread_as_asked() -> None:
    def largest(max_cosine: float | None) -> float:
        directions = random_directions(32, 12, seed=0, max_cosine=max_cosine)
        return (directions @ directions.T - torch.eye(32)).abs().max().item()

    assert largest(0.45) <= 0.45 + 1e-6 < largest(None)


def test_no_more_directions_than_dimensions_are_orthonormal_when_spread() -> None:
    directions = random_directions(5, 7, seed=0, max_cosine=0.5)
    torch.testing.assert_close(directions @ directions.T, torch.eye(5), atol=1e-6, rtol=0)


def test_directions_that_cannot_be_spread_are_an_error() -> None:
    with pytest.raises(ValueError, match="max_cosine: 40 directions in 2 dimensions could not be brought to 0.3"):
        random_directions(40, 2, seed=0, max_cosine=0.3)


def test_directions_follow_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(random_directions(6, 3, seed=4), random_directions(6, 3, seed=4))
    assert not torch.equal(random_directions(6, 3, seed=4), random_directions(6, 3, seed=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_zipf_weights() -> None:
    assert zipf_weights(3, 2.0).tolist() == pytest.approx([1, 1 / 4, 1 / 9])
    assert zipf_weights(3, 0.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([4, 1, 1], 0.6, [0.4, 0.1, 0.1]),
        ([4, 1, 1], 1.5, [1, 0.25, 0.25]),
        ([1, 4, 1], 2, [0.5, 1, 0.5]),  # the largest cannot be above 1: the others make up for it
        ([4, 2, 1], 2.5, [1, 1, 0.5]),
        ([4, 2, 1], 3, [1, 1, 1]),
    ],
)
def test_weights_are_scaled_to_a_sum_of_probabilities(
    weights: list[float], total: float, expected: list[float]
) -> None:
    assert scaled_to_sum(torch.tensor(weights, dtype=torch.float64), total).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("total", [0.0, 3.5])
def test_impossible_sum_is_refused(total: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0 and at most 3"):
        scaled_to_sum(torch.ones(3), total)


# ------------------------------------------------------------------------------------------------------------ the data


def test_independent_features_fire_as_often_as_asked_and_independently() -> None:
    _, acts = draw(make_model([0.5, 0.1, 0.01, 1.0, 0.0]))
    fires = acts > 0
    for i, probability in enumerate([0.5, 0.1, 0.01]):
        check_share(fires[:, i], probability)
    check_share(fires[:, 0] & fires[:, 1], 0.05)
    assert fires[:, 3].all()
    assert not fires[:, 4].any()


def test_rows_are_the_sum_of_directions_and_bias() -> None:
    bias = torch.tensor([1.0, -2.0, 0.0, 3.0])
    model = make_model([0.3] * 6, bias=bias)
    rows, acts = draw(model, rows=50)
    torch.testing.assert_close(rows, acts @ model.directions + bias)


def test_noise_has_the_standard_deviation_asked_for() -> None:
    model = make_model([0.3] * 6, noise_std=0.2)
    rows, acts = draw(model)
    noise = rows - acts @ model.directions
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize(
    ("magnitudes", "least", "mean"),
    # the mean of |standard normal| is sqrt(2 / pi)
    [("one_plus_normal", 1.0, 1 + math.sqrt(2 / math.pi)), ("uniform", 0.0, 0.5)],
)
def test_magnitudes(magnitudes: str, least: float, mean: float) -> None:
    _, acts = draw(make_model([0.5], magnitudes=magnitudes))
    firing = acts[acts > 0]
    assert firing.min() >= least
    assert firing.mean().item() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_group_of_correlated_features(correlation: float) -> None:
    _, acts = draw(make_model([0.5, 0.5, 0.5, 0.2], groups=[range(3)], correlation=correlation))
    fires = acts > 0
    for i, probability in enumerate([0.5, 0.5, 0.5, 0.2]):
        check_share(fires[:, i], probability)
    # Sheppard: two normals of correlation r are both negative with probability 1/4 + arcsin(r) / (2 pi).
    both = 0.25 + math.asin(correlation) / (2 * math.pi)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        check_share(fires[:, i] & fires[:, j], both)
    check_share(fires[:, 0] & fires[:, 3], 0.1)


def test_groups_are_independent_of_each_other() -> None:
    _, acts = draw(make_model([0.5] * 4, groups=[[0, 2], [1, 3]], correlation=1.0))
    fires = acts > 0
    assert torch.equal(fires[:, 0], fires[:, 2])
    assert torch.equal(fires[:, 1], fires[:, 3])
    check_share(fires[:, 0] & fires[:, 1], 0.25)


def test_exclusive_pair_never_fires_together() -> None:
    _, acts = draw(make_model([0.3, 0.9, 0.5], exclusive_pairs=[(0, 2)]))
    fires = acts > 0
    assert not (fires[:, 0] & fires[:, 2]).any()
    for i, probability in enumerate([0.3, 0.9, 0.5]):
        check_share(fires[:, i], probability)


def test_child_never_fires_without_its_parent_and_keeps_its_frequency() -> None:
    parents = torch.tensor([-1, -1, 0, 0, 1])
    _, acts = draw(make_model([0.4, 0.2, 0.1, 0.4, 0.05], parents=parents))
    fires = acts > 0
    for child in (2, 3, 4):
        assert not (fires[:, child] & ~fires[:, parents[child]]).any()
    for i, probability in enumerate([0.4, 0.2, 0.1, 0.4, 0.05]):
        check_share(fires[:, i], probability)
    check_share(fires[:, 2] & fires[:, 4], 0.1 * 0.05)


def test_draws_follow_from_the_seed_alone_and_go_on() -> None:
    model = make_model([0.3] * 6, groups=[[0, 1]], correlation=0.5, noise_std=0.1)
    one, other = ToyModelGenerator(model, 3), ToyModelGenerator(model, 3)
    first = one.next_batch(20)
    before = torch.get_rng_state()
    torch.rand(5)
    again = other.next_batch(20)
    torch.set_rng_state(before)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, one.next_batch(20).rows)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magnitudes": "normal"}, "magnitudes: found 'normal', expected 'one_plus_normal' or 'uniform'"),
        ({"parents": torch.tensor([-1, 0, 1])}, "parents: a parent has a parent itself"),
        ({"parents": torch.tensor([2, -1, -1])}, "parents: a child is more frequent than its parent"),
        ({"groups": [[0, 1], [1, 2]]}, "a feature is in two of them"),
        ({"groups": [[0, 1]], "exclusive_pairs": [(2, 0)]}, "a feature is in two of them"),
        ({"groups": [[1, 2]], "parents": torch.tensor([-1, 0, -1])}, "a feature is in two of them"),
    ],
)
def test_model_that_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model([0.5, 0.4, 0.3], **options)
