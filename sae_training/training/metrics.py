"""Figures of a training step, under the names that dashboards of the mats era use."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.parallel.share import Share
from sae_training.sparse_autoencoder.losses import wide
from sae_training.training.dead_latents import FiringTracker
from sae_training.training.trainer import StepResult


def explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """1 - sum of squared errors / sum of squares around the mean row, over all rows and elements of (rows, d).

    In this form rows of large norm count by their share of the variance. In a mean over rows of each row's own ratio,
    near-constant rows would dominate.
    """
    x, x_hat = wide(x), wide(x_hat)
    return 1 - (x_hat - x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()


def row_explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """For each row, (rows,): 1 - its squared error / its squared distance from the mean row."""
    x, x_hat = wide(x), wide(x_hat)
    return 1 - (x_hat - x).pow(2).sum(dim=-1) / (x - x.mean(dim=0)).pow(2).sum(dim=-1)


def variances_explained(x: Tensor, x_hat: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """`explained_variance`, and the standard deviation of `row_explained_variance`, over the rows of all processes.

    `x`, `x_hat` (rows, d): those of this one. Only sums go from process to process.
    """
    if share.is_all:
        return explained_variance(x, x_hat), row_explained_variance(x, x_hat).std()
    x, x_hat = wide(x), wide(x_hat)
    n = share.summed(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device))
    error = (x_hat - x).pow(2).sum(dim=-1)
    distance = (x - share.summed(x.sum(dim=0)) / n).pow(2).sum(dim=-1)
    of_rows = 1 - error / distance
    all_error, all_distance, of_all_rows = share.summed(torch.stack([error.sum(), distance.sum(), of_rows.sum()]))
    deviation = share.summed((of_rows - of_all_rows / n).pow(2).sum())
    return 1 - all_error / all_distance, (deviation / (n - 1)).sqrt()


@torch.no_grad()
def training_metrics(result: StepResult, tracker: FiringTracker, n_training_tokens: int) -> dict[str, float]:
    """The figures of a step, read off the device. `losses/l1_loss` is the L1 norm without its coefficient."""
    out = result.out
    explained, of_rows = variances_explained(result.target, out.sae_out, result.share)
    figures = {
        "losses/mse_loss": out.mse_loss,
        "losses/l1_loss": out.code.l1(),
        "losses/ghost_grad_loss": out.ghost_grad_loss,
        "losses/overall_loss": out.loss,
        "metrics/explained_variance": explained,
        "metrics/explained_variance_std": of_rows,
        "metrics/l0": out.code.l0(),
        "sparsity/mean_passes_since_fired": tracker.mean_steps_since_fired(),
        "sparsity/dead_features": tracker.n_dead(),
        "sparsity/revived_features": tracker.n_revived(),
        "details/n_training_tokens": n_training_tokens,
        "details/current_learning_rate": result.lr,
        "details/current_l1_coefficient": result.l1_coefficient,
    }
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in figures.items()}


def sparsity_metrics(log_frequency: Tensor, dead_feature_threshold: float) -> dict[str, float]:
    """Summary of log10 firing frequencies (d_sae,): their mean, and how many latents fire less than some limits."""
    frequency = 10 ** log_frequency.double() - 1e-10
    return {
        "sparsity/below_dead_feature_threshold": int((frequency < dead_feature_threshold).sum()),
        "metrics/mean_log10_feature_sparsity": log_frequency.mean().item(),
        "sparsity/below_1e-5": int((log_frequency < -5).sum()),
        "sparsity/below_1e-6": int((log_frequency < -6).sum()),
    }
