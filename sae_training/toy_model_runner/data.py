"""Synthetic activations whose dictionary is known, and scores of how well an autoencoder finds it.

row = sum over firing features i of magnitude_i * direction_i + bias + noise

There are more features than dimensions, so they lie in superposition, and few of them fire on any row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ the dictionary


def random_directions(n_features: int, d_in: int, seed: int, max_cosine: float | None = None) -> Tensor:
    """Unit vectors (n_features, d_in), uniform on the sphere; with `max_cosine`, spread until no two exceed it.

    Spreading is gradient descent on the sum over pairs of ReLU(|cosine| - max_cosine)^2. Limits near the least possible
    one, sqrt((n - d) / (d (n - 1))) by Welch 1974, are hard to reach: ValueError if it is not.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    if max_cosine is None:
        return directions
    if n_features <= d_in:
        return torch.linalg.qr(directions.T).Q.T.contiguous()  # orthonormal
    for _ in range(2000):
        cosines = (directions @ directions.T).fill_diagonal_(0)
        if cosines.abs().max() <= max_cosine:
            return directions
        # aims a little below the limit, which would otherwise be approached for ever
        directions -= 0.5 * torch.nn.functional.softshrink(cosines, 0.95 * max_cosine) @ directions
        directions /= directions.norm(dim=1, keepdim=True)
    raise ValueError(
        f"max_cosine: {n_features} directions in {d_in} dimensions were not brought to {max_cosine} or below; raise it "
        "or leave it out"
    )


def zipf_weights(n_features: int, exponent: float) -> Tensor:
    """Relative frequencies 1 / (i + 1)^exponent of features i = 0, 1, ..., (n_features,); exponent 0 is uniform."""
    return torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent


def scaled_to_sum(weights: Tensor, total: float) -> Tensor:
    """Probabilities min(1, c * weights) with the c for which they sum to `total`, (n,)."""
    if not 0 < total <= len(weights):
        raise ValueError(f"total: found {total}, expected more than 0 and at most {len(weights)}, the features")
    ordered = weights.sort(descending=True).values
    # With the m largest at 1, c is what the others need: the right m is the first whose c leaves them at 1 or below.
    rest = ordered.flip(0).cumsum(0).flip(0)
    scales = (total - torch.arange(len(weights))).clamp_min(0) / rest
    first = int((scales * ordered <= 1 + 1e-12).int().argmax())
    return (weights * scales[first]).clamp_max(1)


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class ToyModel:
    """A dictionary and the law by which its features fire.

    `directions` (n_features, d_in) of unit norm and `probabilities` (n_features,), the share of rows on which each
    fires. Relations between features, each feature being in at most one kind:

    * `groups`, lists of features that tend to fire together: by a Gaussian copula, feature i fires where
      z_i < quantile(p_i), and the standard normals z of a group have pairwise correlation `correlation`. At 1 features
      of equal probability fire together or not at all.
    * `exclusive_pairs`: one copula with z_j = -z_i, so that the two never fire together while p_i + p_j <= 1.
    * `parents` (n_features,), the index of each feature's parent or -1: a child fires only where its parent does, with
      probability p_child / p_parent there, so that its overall frequency is p_child.

    Magnitudes of firing features are 1 + |standard normal| ("one_plus_normal") or uniform in (0, 1] ("uniform").
    `bias` (d_in,) is added to every row, and `noise_std` times a standard normal to every element.
    """

    directions: Tensor
    probabilities: Tensor
    groups: Sequence[Sequence[int]] = ()
    correlation: float = 0.0
    exclusive_pairs: Sequence[tuple[int, int]] = ()
    parents: Tensor | None = None
    magnitudes: str = "one_plus_normal"
    bias: Tensor | None = None
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        if self.magnitudes not in ("one_plus_normal", "uniform"):
            raise ValueError(f"magnitudes: found {self.magnitudes!r}, expected 'one_plus_normal' or 'uniform'")
        related = [i for members in [*self.groups, *self.exclusive_pairs] for i in members]
        if self.parents is not None:
            children = (self.parents >= 0).nonzero().flatten()
            related += children.tolist()
            above = self.parents[children]
            if (self.parents[above] >= 0).any():
                raise ValueError("parents: a parent has a parent itself, expected one level")
            if (self.probabilities[children] > self.probabilities[above]).any():
                raise ValueError("parents: a child is more frequent than its parent, which it cannot fire without")
        if len(related) != len(set(related)):
            raise ValueError("groups, exclusive_pairs, parents: a feature is in two of them, expected one at most")


class Batch(NamedTuple):
    """Rows and the activations of the true features that made them."""

    rows: Tensor
    """(n, d_in)"""
    acts: Tensor
    """(n, n_features), 0 where a feature does not fire."""


class ToyModelGenerator:
    """Draws rows from a ToyModel with a random generator of its own, so that nothing else changes what it draws."""

    def __init__(self, model: ToyModel, seed: int, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.directions = model.directions.to(self.device)
        self.bias = None if model.bias is None else model.bias.to(self.device)
        probabilities = model.probabilities.double()
        parents = torch.full((len(probabilities),), -1) if model.parents is None else model.parents
        child = parents >= 0
        self.children = child.nonzero().flatten().to(self.device)
        self.parents = parents[child].to(self.device)
        given_parent = torch.where(child, probabilities / probabilities[parents.clamp_min(0)], probabilities)
        self.thresholds = given_parent.float().to(self.device)
        self.quantiles = torch.special.ndtri(probabilities).float().to(self.device)
        # Pairs lie first in `grouped`, as (i, j, i, j, ...).
        members = [*model.exclusive_pairs, *model.groups]
        self.grouped = torch.tensor([i for group in members for i in group], dtype=torch.long, device=self.device)
        sizes = [len(group) for group in model.groups]
        self.group_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        self.group_of = self.group_of.to(self.device)

    @torch.no_grad()
    def next_batch(self, n: int) -> Batch:
        """`n` independent rows and their truth."""
        fires = self.firing(n)
        acts = torch.zeros(fires.shape, device=self.device)
        places = fires.flatten().nonzero().squeeze(1)
        acts.view(-1)[places] = self.draw_magnitudes(len(places))
        rows = acts @ self.directions
        if self.bias is not None:
            rows += self.bias
        if self.model.noise_std > 0:
            rows += self.model.noise_std * torch.randn(rows.shape, generator=self.generator, device=self.device)
        return Batch(rows, acts)

    def firing(self, n: int) -> Tensor:
        """Which features fire, bool (n, n_features)."""
        shape = (n, len(self.thresholds))
        fires = torch.rand(shape, generator=self.generator, device=self.device) < self.thresholds
        if len(self.grouped):
            fires[:, self.grouped] = self.copula(n) < self.quantiles[self.grouped]
        if len(self.children):
            fires[:, self.children] &= fires[:, self.parents]
        return fires

    def copula(self, n: int) -> Tensor:
        """The normals of the features in `grouped`, (n, len(grouped)): z and -z for each pair, then the groups.

        In a group z = sqrt(correlation) * (normal of the group) + sqrt(1 - correlation) * (its own normal).
        """
        n_pairs, n_groups = len(self.model.exclusive_pairs), len(self.model.groups)
        shared = torch.randn(n, n_pairs + n_groups, generator=self.generator, device=self.device)
        own = torch.randn(n, len(self.group_of), generator=self.generator, device=self.device)
        pairs = torch.stack([shared[:, :n_pairs], -shared[:, :n_pairs]], dim=2).flatten(1)
        common = math.sqrt(self.model.correlation) * shared[:, n_pairs:][:, self.group_of]
        return torch.cat([pairs, common + math.sqrt(1 - self.model.correlation) * own], dim=1)

    def draw_magnitudes(self, n: int) -> Tensor:
        if self.model.magnitudes == "uniform":
            return 1 - torch.rand(n, generator=self.generator, device=self.device)  # never 0
        return 1 + torch.randn(n, generator=self.generator, device=self.device).abs()
