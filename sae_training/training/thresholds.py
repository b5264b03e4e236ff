"""What moves jumprelu's thresholds besides the optimizer: where they start, how fast they learn, and target_l0.

Thresholds are learned as logarithms, and a step of Adam moves a logarithm by at most lr: at lr 3e-4, the 488 steps of a
million rows change a threshold by at most a sixth. In short runs, thresholds that start far from where they belong
therefore never arrive. So they start from the data (`start_thresholds`), have a learning rate of their own where a
penalty has to move them (`threshold_lr`), and with target_l0 move all together until L0 is there (`TargetL0`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.jumprelu import starts_from_data
from sae_training.kernels.sparse_code import Code, CodeFigures
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import centred_norm, mean_normalised_error, wide

MAX_ELEMENTS = 2**22  # of the pre-activations that first thresholds are taken from: 16 MB in float32
MAX_SHARE_ACTIVE = 0.25  # of latents at the start: more are slow on a CPU, and are learned worse (docs/toy-models.md)

GAIN = 0.1
"""Share of the distance of log L0 from its target that a step moves log thresholds.

d log L0 / d log threshold is -10 for normal pre-activations of which one in a thousand is active, and -2 to -3 in
trained autoencoders: 0.1 is the largest gain that overshoots in neither, and follows within some five steps.
"""
GAIN_OF_DRIFT = GAIN**2 / 4  # without it, L0 would stay off by what the weights' learning changes it in ten steps
LARGEST_DISTANCE = 1.0  # of log L0 that counts, so that one batch without an active latent does not undo a run

THRESHOLDS = "thresholds"  # marks their group of parameters

TRAVEL = 5.0
"""How far, in logarithms, the optimizer can move a threshold in a whole run at a constant rate: by a factor of 150."""


# ----------------------------------------------------------------------------------------------------- first thresholds


@torch.no_grad()
def start_thresholds(sae: SparseAutoencoder, x: Tensor, target: Tensor | None = None) -> str | None:
    """Set the thresholds of a jumprelu autoencoder from a sample of activations, one for all latents.

    `x` (rows, d_in) and a transcoder's `target` (rows, d_out) are as training gets them; b_dec is set before. Nothing
    changes for other architectures, or where the config names the first threshold. Return what the user should know.
    """
    cfg = sae.full_cfg
    if sae.architecture != "jumprelu":
        return None
    x, target = sae.normalize(x), sae.normalize(x if target is None else target)
    d_sae = sae.shard.d_sae
    pre = sae.shard.gathered(sae.pre_activations(sae.sae_input(x[: max(1, MAX_ELEMENTS // d_sae)])).flatten())
    if starts_from_data(cfg):
        l0 = cfg.target_l0 if cfg.jumprelu_init_l0 == "auto" else cfg.jumprelu_init_l0
        if l0 is not None:
            first = threshold_of_l0(pre, d_sae, float(l0))
        else:
            lowest, highest = (threshold_of_l0(pre, d_sae, n) for n in (MAX_SHARE_ACTIVE * d_sae, 1.0))
            first = break_even(target, cfg.l1_coefficient).to(pre.dtype).clamp(lowest, highest)
        sae.log_threshold.fill_(first.clamp_min(torch.finfo(pre.dtype).tiny).log())
    if cfg.target_l0 is None:
        return costs_more_than_it_saves(sae, x, target, cfg)
    return too_far(sae.log_threshold[0].item(), threshold_of_l0(pre, d_sae, cfg.target_l0).item(), cfg)


def threshold_of_l0(pre: Tensor, d_sae: int, l0: float) -> Tensor:
    """The value above which lie l0 of every d_sae of the pre-activations `pre` (n,), a scalar."""
    n_above = round(len(pre) * min(1.0, l0 / d_sae))
    return pre.kthvalue(max(1, len(pre) - n_above)).values


def break_even(target: Tensor, l1_coefficient: float) -> Tensor:
    """The activation that saves as much reconstruction loss as it costs in L0 penalty, a scalar.

    By itself, an activation a of a latent of unit norm takes a^2 off the squared error of a row, which the loss divides
    by the row's centred norm and by d_out.
    """
    target = wide(target)
    return (l1_coefficient * centred_norm(target).mean() * target.shape[1]).sqrt()


def costs_more_than_it_saves(
    sae: SparseAutoencoder, x: Tensor, target: Tensor, cfg: LanguageModelSAERunnerConfig
) -> str | None:
    """Say so if an active latent costs more than the whole loss of a mean row, so that L0 will fall to about 0."""
    empty = mean_normalised_error(sae.baseline(x).expand_as(target), target, centred_norm(wide(target))).item()
    if cfg.l1_coefficient < empty:
        return None
    return (
        f"l1_coefficient: found {cfg.l1_coefficient:g}, expected less than {empty:.2g}, the loss of a row without any "
        "active latent; a latent that costs more than it can save is off, and L0 falls to about 0; lower it, or set "
        "target_l0"
    )


def too_far(log_first: float, wanted: float, cfg: LanguageModelSAERunnerConfig) -> str | None:
    """Say so if no threshold above 0 gives target_l0, or if the run's steps do not lead to the one that does."""
    if wanted <= 0:
        return (
            f"target_l0: found {cfg.target_l0:g}, more than the pre-activations above 0 that the first rows have; "
            "lower it, or raise expansion_factor"
        )
    distance = abs(math.log(wanted) - log_first)
    reach = GAIN * LARGEST_DISTANCE * cfg.total_training_steps
    if distance <= reach:
        return None
    return (
        f"target_l0: found {cfg.target_l0:g}, which the first thresholds ({math.exp(log_first):.3g}) are too far from: "
        f"they would have to be {wanted:.3g}, and {cfg.total_training_steps} steps change them by a factor of at most "
        f"{math.exp(reach):.3g}; leave out jumprelu_init_threshold and jumprelu_init_l0, or train longer"
    )


# ------------------------------------------------------------------------------------------------------- in each step


def groups_of(masters: dict[str, Parameter]) -> list[dict[str, Any]]:
    """The parameters as groups for an optimizer: all, and apart from them the thresholds, if there are any."""
    others = {"params": [master for name, master in masters.items() if name != "log_threshold"]}
    if "log_threshold" not in masters:
        return [others]
    return [others, {"params": [masters["log_threshold"]], THRESHOLDS: True}]


def threshold_lr(cfg: LanguageModelSAERunnerConfig, lr: float) -> float:
    """The learning rate of thresholds in a step where that of all other weights is `lr`.

    With target_l0 it is the same, because what is left to the optimizer are differences between latents. With signum
    too, which moves thresholds at the full rate even where they have no gradient any more.
    """
    if cfg.target_l0 is not None or cfg.optimizer == "signum":
        return lr
    return lr * max(1.0, TRAVEL / (cfg.resolved_lr * cfg.total_training_steps))


class TargetL0:
    """Moves all thresholds of a jumprelu autoencoder together, until L0 is target_l0. Its state is the drift."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig, device: torch.device) -> None:
        self.target = cfg.target_l0 if cfg.architecture == "jumprelu" else None
        self.drift = torch.zeros((), device=device)
        """What log thresholds have to move in each step to keep L0 where it is, while weights and thresholds learn."""

    @torch.no_grad()
    def follow(self, sae: SparseAutoencoder, code: Code | CodeFigures, unless: Tensor) -> None:
        """Move the thresholds by what the L0 of a batch's `code` says; do nothing where `unless` is true."""
        if self.target is None:
            return
        distance = (code.l0() / self.target).log().clamp(-LARGEST_DISTANCE, LARGEST_DISTANCE)
        distance = torch.where(unless, 0.0, distance)
        self.drift += GAIN_OF_DRIFT * distance
        sae.log_threshold.add_(torch.where(unless, 0.0, GAIN * distance + self.drift).to(sae.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.target is None else {"drift": self.drift}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:  # checkpoints of earlier versions have none
            self.drift.copy_(state["drift"])
