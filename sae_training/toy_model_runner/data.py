"""Draws synthetic activations whose dictionary is known.

row = sum over firing features i of magnitude_i * direction_i + bias + noise

There are more features than dimensions, so the features are in superposition; few of them fire on any row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_training.machine.device import checked

# ------------------------------------------------------------------------------------------------------ the dictionary


def random_directions(n_features: int, d_in: int, seed: int, max_cosine: float | None = None) -> Tensor:
    """Return unit vectors (n_features, d_in), uniform on the sphere, or spread until no |cosine| exceeds `max_cosine`.

    Spreading is gradient descent on the sum over pairs of ReLU(|cosine| - max_cosine)^2. The least possible limit is
    sqrt((n - d) / (d (n - 1))) (Welch 1974); limits close to it may not be reached, which is a ValueError.
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
        # The target lies a little below the limit, because the limit itself would only be approached.
        directions -= 0.5 * torch.nn.functional.softshrink(cosines, 0.95 * max_cosine) @ directions
        directions /= directions.norm(dim=1, keepdim=True)
    raise ValueError(
        f"max_cosine: {n_features} directions in {d_in} dimensions could not be brought to {max_cosine} or below; "
        "raise it or leave it out"
    )


def zipf_weights(n_features: int, exponent: float) -> Tensor:
    """Return relative frequencies 1 / (i + 1)^exponent of features i = 0, 1, ..., (n_features,); uniform for 0."""
    return torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent


def scaled_to_sum(weights: Tensor, total: float) -> Tensor:
    """Return probabilities min(1, c * weights), (n,), with the c for which they sum to `total`."""
    if not 0 < total <= len(weights):
        raise ValueError(f"total: found {total}, expected more than 0 and at most {len(weights)}, the features")
    ordered = weights.sort(descending=True).values
    # scales[m] is c if the m largest are at 1. The right m is the first whose c keeps all others at 1 or below.
    rest = ordered.flip(0).cumsum(0).flip(0)
    scales = (total - torch.arange(len(weights))).clamp_min(0) / rest
    first = int((scales * ordered <= 1 + 1e-12).int().argmax())
    return (weights * scales[first]).clamp_max(1)


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class ToyModel:
    """A dictionary, and the law by which its features fire.

    `directions` (n_features, d_in) have unit norm; `probabilities` (n_features,) are the shares of rows on which the
    features fire. Features can be related, each in one way at most:

    * `groups`, lists of features that tend to fire together: by a Gaussian copula, feature i fires where
      z_i < quantile(p_i), and the standard normals z of a group have pairwise correlation `correlation`. At 1 features
      of equal probability fire together or not at all.
    * `exclusive_pairs`: a copula with z_j = -z_i, so that i and j never fire together while p_i + p_j <= 1.
    * `parents` (n_features,), the index of each feature's parent or -1. A child fires only where its parent fires, with
      probability p_child / p_parent, so that its overall frequency is p_child.

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
    """Rows, and the activations of the true features that they are made of."""

    rows: Tensor
    """(n, d_in)"""
    acts: Tensor
    """(n, n_features), 0 where a feature does not fire."""


class ToyModelGenerator:
    """Draws rows from a ToyModel. Its random generator is its own, so that its rows depend on `seed` alone."""

    def __init__(self, model: ToyModel, seed: int, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.device = checked(device)
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
        # `grouped` begins with the pairs: i, j, i, j, ...
        members = [*model.exclusive_pairs, *model.groups]
        self.grouped = torch.tensor([i for group in members for i in group], dtype=torch.long, device=self.device)
        sizes = [len(group) for group in model.groups]
        self.group_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        self.group_of = self.group_of.to(self.device)

    @torch.no_grad()
    def next_batch(self, n: int) -> Batch:
        """Draw `n` independent rows and their true activations."""
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
        """Draw which features fire on `n` rows, bool (n, n_features)."""
        shape = (n, len(self.thresholds))
        fires = torch.rand(shape, generator=self.generator, device=self.device) < self.thresholds
        if len(self.grouped):
            fires[:, self.grouped] = self.copula(n) < self.quantiles[self.grouped]
        if len(self.children):
            fires[:, self.children] &= fires[:, self.parents]
        return fires

    def copula(self, n: int) -> Tensor:
        """Draw the normals of the features in `grouped`, (n, len(grouped)): z and -z for each pair, then the groups.

        In a group, z = sqrt(correlation) * (normal of the group) + sqrt(1 - correlation) * (its own normal).
        """
        n_pairs, n_groups = len(self.model.exclusive_pairs), len(self.model.groups)
        shared = torch.randn(n, n_pairs + n_groups, generator=self.generator, device=self.device)
        own = torch.randn(n, len(self.group_of), generator=self.generator, device=self.device)
        pairs = torch.stack([shared[:, :n_pairs], -shared[:, :n_pairs]], dim=2).flatten(1)
        common = math.sqrt(self.model.correlation) * shared[:, n_pairs:][:, self.group_of]
        return torch.cat([pairs, common + math.sqrt(1 - self.model.correlation) * own], dim=1)

    def draw_magnitudes(self, n: int) -> Tensor:
        """Draw the magnitudes of `n` firings, (n,), all above 0."""
        if self.model.magnitudes == "uniform":
            return 1 - torch.rand(n, generator=self.generator, device=self.device)
        return 1 + torch.randn(n, generator=self.generator, device=self.device).abs()
