from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sae_training.kernels.sparse_code import Code
from sae_training.sparse_autoencoder.losses import Losses
from sae_training.training.dead_latents import FiringTracker
from sae_training.training.metrics import explained_variance, row_explained_variance, sparsity_metrics, training_metrics
from sae_training.training.trainer import StepResult

# The rows have the mean (0, 0) and squared distances 4, 1, 1 from it; the reconstruction misses by 2, 1/4 and 0.
X = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
X_HAT = torch.tensor([[1.0, 1.0], [-0.5, 0.0], [-1.0, 0.0]])


def test_explained_variance_is_of_all_rows_at_once() -> None:
    assert explained_variance(X, X_HAT).item() == pytest.approx(1 - 2.25 / 6)


def test_row_explained_variance_is_of_each_row_alone() -> None:
    assert row_explained_variance(X, X_HAT).tolist() == pytest.approx([0.5, 0.75, 1.0])


def test_explained_variance_subtracts_the_mean_row() -> None:
    shift = torch.tensor([3.0, -7.0])
    assert explained_variance(X + shift, X_HAT + shift).item() == pytest.approx(1 - 2.25 / 6)


@pytest.mark.parametrize(("x_hat", "expected"), [(X, 1.0), (torch.zeros_like(X), 0.0), (-X, -3.0)])
def test_explained_variance_of_the_rows_of_their_mean_and_of_the_opposite(x_hat: Tensor, expected: float) -> None:
    assert explained_variance(X, x_hat).item() == pytest.approx(expected)


def test_explained_variance_in_half_precision_sums_in_float32() -> None:
    # 10,000 squares of 10 come to 1e6, beyond float16.
    x = torch.tensor([10.0, -10.0], dtype=torch.float16).repeat(5000).reshape(-1, 2).T.reshape(2, -1)
    assert explained_variance(x, x * 0.5).item() == pytest.approx(0.75)


def test_l0_is_the_mean_count_above_zero() -> None:
    assert Code(torch.tensor([[0.0, 1e-9, 3.0], [0.0, 0.0, 2.0]])).l0().item() == 1.5


# --------------------------------------------------------------------------------------------------------- a train step


def step_result(l1_coefficient: float = 0.25, l1_loss: float = 0.5) -> StepResult:
    acts = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    losses = (torch.tensor(value) for value in (2.0, 1.0, l1_loss, 0.125))  # loss, mse, l1, ghost
    return StepResult(X, Losses(X_HAT, Code(acts), *losses), lr=3e-4, l1_coefficient=l1_coefficient)


def tracker() -> FiringTracker:
    """Latents silent for 3 and 1 steps, dead from 3 on."""
    counts = FiringTracker(d_sae=2, dead_window=2, dead_window_tokens=None)
    counts.update(Code(torch.tensor([[1.0, 1.0]])))
    for acts in ([[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 0.0]]):
        counts.update(Code(torch.tensor(acts)))
    return counts


def test_training_metrics_have_the_names_of_the_mats_era_and_no_others() -> None:
    assert set(training_metrics(step_result(), tracker(), 192)) == {
        "losses/mse_loss",
        "losses/l1_loss",
        "losses/ghost_grad_loss",
        "losses/overall_loss",
        "metrics/explained_variance",
        "metrics/explained_variance_std",
        "metrics/l0",
        "sparsity/mean_passes_since_fired",
        "sparsity/dead_features",
        "sparsity/revived_features",
        "details/n_training_tokens",
        "details/current_learning_rate",
        "details/current_l1_coefficient",
    }


def test_training_metrics_by_hand() -> None:
    assert training_metrics(step_result(), tracker(), 192) == pytest.approx(
        {
            "losses/mse_loss": 1.0,
            "losses/l1_loss": 0.5 / 0.25,
            "losses/ghost_grad_loss": 0.125,
            "losses/overall_loss": 2.0,
            "metrics/explained_variance": 0.625,
            "metrics/explained_variance_std": 0.25,  # of 0.5, 0.75 and 1
            "metrics/l0": 1.0,
            "sparsity/mean_passes_since_fired": 2.0,
            "sparsity/dead_features": 1,
            "sparsity/revived_features": 0,
            "details/n_training_tokens": 192,
            "details/current_learning_rate": 3e-4,
            "details/current_l1_coefficient": 0.25,
        }
    )


def test_training_metrics_are_plain_numbers() -> None:
    assert {type(value) for value in training_metrics(step_result(), tracker(), 192).values()} == {int, float}


def test_l1_loss_without_a_coefficient_is_the_mean_sum_of_activations() -> None:
    metrics = training_metrics(step_result(l1_coefficient=0.0, l1_loss=0.0), tracker(), 192)
    assert metrics["losses/l1_loss"] == (1 + 0 + 5) / 3


# ------------------------------------------------------------------------------------------------- firing frequencies


def test_sparsity_metrics_by_hand() -> None:
    # Frequencies 1/10, 1/2e5, 1/2e6 and never.
    log_frequency = torch.tensor([-1.0, -math.log10(2e5), -math.log10(2e6), -10.0])
    assert sparsity_metrics(log_frequency, dead_feature_threshold=1e-5) == pytest.approx(
        {
            "sparsity/below_dead_feature_threshold": 3,
            "metrics/mean_log10_feature_sparsity": -(1 + math.log10(2e5) + math.log10(2e6) + 10) / 4,
            "sparsity/below_1e-5": 3,
            "sparsity/below_1e-6": 2,
        }
    )


def test_smallest_threshold_counts_latents_that_never_fired() -> None:
    # 1e-8 is below one firing in 10 million tokens; log frequencies have a floor of 1e-10 added.
    log_frequency = torch.tensor([1e-7, 0.0]).double().add(1e-10).log10().float()
    assert sparsity_metrics(log_frequency, dead_feature_threshold=1e-8)["sparsity/below_dead_feature_threshold"] == 1


def test_frequency_at_the_threshold_is_not_below_it() -> None:
    log_frequency = torch.tensor([0.25]).add(1e-10).log10()
    assert sparsity_metrics(log_frequency, dead_feature_threshold=0.2499)["sparsity/below_dead_feature_threshold"] == 0
