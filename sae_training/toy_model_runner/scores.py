"""Scores of how well an autoencoder found a dictionary that is known.

true directions, decoder --cosines--> one latent for each feature --rows--> F1 of the pairs, dead latents, L0, variance
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_training.machine.precision import in_float64
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.toy_model_runner.data import ToyModel, ToyModelGenerator
from sae_training.training.metrics import explained_variance

ROWS_AT_A_TIME = 4096  # scored together


class Scores(NamedTuple):
    """How well an autoencoder found the dictionary: the figures, and what the picture shows."""

    figures: dict[str, float]
    base: dict[str, float]
    """Facts of the rows that the figures are over."""
    cosines: Tensor
    """(n_features, d_sae)"""
    matched: Tensor
    """Latent of each feature, or -1, (n_features,)."""
    f1: Tensor
    """(n_features,)"""
    frequencies: Tensor
    """Share of rows on which each feature fired, (n_features,)."""


@torch.no_grad()
def score(sae: SparseAutoencoder, model: ToyModel, data: ToyModelGenerator, n_rows: int) -> Scores:
    """Compare `sae` with the dictionary, and its firing with the truth on `n_rows` rows of `data`."""
    cosines = cosine_matrix(model.directions.to(sae.device), sae.W_dec.float())
    matched = match_one_to_one(cosines)
    counts = FiringCounts(matched, sae.d_sae)
    rows, rows_out, n_active = [], [], []
    for start in range(0, n_rows, ROWS_AT_A_TIME):
        batch = data.next_batch(min(ROWS_AT_A_TIME, n_rows - start))
        feature_acts = sae.encode(batch.rows)
        counts.add(batch.acts, feature_acts)
        rows.append(batch.rows)
        rows_out.append(sae.decode(feature_acts))
        n_active.append((feature_acts > 0).sum())
    f1 = counts.f1()
    figures = {
        "recovered_share": recovered_share(cosines),
        "mean_max_cosine": max_cosines(cosines).mean().item(),
        "mean_f1": f1.nanmean().item(),
        "dead_fraction": counts.dead_fraction(),
        "l0": torch.stack(n_active).sum().item() / n_rows,
        "true_l0": counts.true_firings.sum().item() / n_rows,
        "explained_variance": explained_variance(torch.cat(rows), torch.cat(rows_out)).item(),
    }
    return Scores(figures, base_of(torch.cat(rows)), cosines, matched, f1, counts.true_frequencies())


def base_of(rows: Tensor) -> dict[str, float]:
    """Facts of the rows (n, n_hidden) that the figures are over, by the names of an evaluation (`report.in_words`)."""
    mean = rows.mean(dim=0)
    variance = (rows - mean).pow(2).mean().item()
    square = rows.pow(2).mean().item()
    return {
        "base/rows": len(rows),
        "base/mean_row_share": 1 - variance / (square or math.nan),
        "base/row_std": math.sqrt(variance),
        "base/largest_mean_element": mean.abs().max().item(),
        "base/predicted_tokens": 0,
    }


# --------------------------------------------------------------------------------------------------------- directions


def cosine_matrix(directions: Tensor, W_dec: Tensor) -> Tensor:
    """Cosine of each true direction (n, d_in) with each decoder row (m, d_in), (n, m); 0 for a row of zeros."""
    return torch.nn.functional.normalize(directions, dim=1) @ torch.nn.functional.normalize(W_dec, dim=1).T


def max_cosines(cosines: Tensor) -> Tensor:
    """Best cosine of each true feature over the decoder rows, (n,); its mean is the MMCS of Sharkey et al. 2022."""
    return cosines.max(dim=1).values


def recovered_share(cosines: Tensor, at_least: float = 0.9) -> float:
    """Share of the true features that have this cosine or a larger one with some decoder row."""
    return (max_cosines(cosines) >= at_least).float().mean().item()


def match_one_to_one(cosines: Tensor) -> Tensor:
    """The latent matched to each feature, (n,), each latent at most once; -1 where there are too few latents.

    The match has the largest sum of cosines of all matches (Hungarian algorithm).
    """
    features, latents = linear_sum_assignment(cosines.detach().cpu().numpy(), maximize=True)
    matched = torch.full((len(cosines),), -1)
    matched[torch.from_numpy(features)] = torch.from_numpy(latents)
    return matched.to(cosines.device)


# ------------------------------------------------------------------------------------------------------------- firing


class FiringCounts:
    """Firings over batches, as `f1_scores` and `dead_fraction` need them; `matched` (n,) as by `match_one_to_one`."""

    def __init__(self, matched: Tensor, d_sae: int) -> None:
        self.matched = matched
        self.rows = 0
        self.hits = torch.zeros(len(matched), dtype=torch.long, device=matched.device)
        self.true_firings = torch.zeros_like(self.hits)
        self.latent_firings = torch.zeros(d_sae, dtype=torch.long, device=matched.device)

    def add(self, true_acts: Tensor, feature_acts: Tensor) -> None:
        """Count a batch of true activations (rows, n) and latent activations (rows, d_sae)."""
        truth, fires = true_acts > 0, feature_acts > 0
        has_latent = self.matched >= 0
        self.hits += (truth & fires[:, self.matched.clamp_min(0)]).sum(dim=0) * has_latent
        self.true_firings += truth.sum(dim=0)
        self.latent_firings += fires.sum(dim=0)
        self.rows += len(true_acts)

    def f1(self) -> Tensor:
        """F1 of each feature, (n,); 0 for a feature that fired and has no latent."""
        latent_firings = self.latent_firings[self.matched.clamp_min(0)] * (self.matched >= 0)
        return f1_scores(self.hits, self.true_firings, latent_firings)

    def true_frequencies(self) -> Tensor:
        """Share of rows on which each feature fired, (n,)."""
        return in_float64(self.true_firings) / max(1, self.rows)

    def dead_fraction(self) -> float:
        """Share of latents that fired on no row."""
        return in_float64(self.latent_firings == 0).mean().item()


def f1_scores(hits: Tensor, true_firings: Tensor, latent_firings: Tensor) -> Tensor:
    """F1 of each feature's latent as its detector, (n,): 2 hits / (true firings + latent firings), of counts (n,).

    `hits` counts the rows on which both fire. NaN where neither ever fires, since nothing is known then.
    """
    return 2 * in_float64(hits) / in_float64(true_firings + latent_firings)
