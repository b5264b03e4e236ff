"""Where jumprelu's thresholds start, how fast they learn, and how they follow target_l0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.kernels.sparse_code import Code
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import centred_norm, mean_normalised_error
from sae_training.training.thresholds import (
    GAIN,
    GAIN_OF_DRIFT,
    TRAVEL,
    TargetL0,
    break_even,
    start_thresholds,
    threshold_lr,
    threshold_of_l0,
)
from sae_training.training.trainer import SAETrainer

D_IN, D_SAE = 32, 128
NO = torch.tensor(False)


def make(**changes: Any) -> SparseAutoencoder:
    fields = {"architecture": "jumprelu", "d_in": D_IN, "expansion_factor": D_SAE // D_IN, "log_to_wandb": False}
    return SparseAutoencoder(Config(**{**fields, **changes}))


def rows(n: int = 2000, scale: float = 1.0, seed: int = 0, d: int = D_IN) -> Tensor:
    """Rows with a mean far from 0, and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(n, d, generator=generator) * torch.linspace(0.2, 3, d) + 5)


def l0(sae: SparseAutoencoder, x: Tensor) -> float:
    return (sae.encode(x) > 0).sum(dim=1).float().mean().item()


# ----------------------------------------------------------------------------------------------------- first thresholds


def test_threshold_of_an_l0() -> None:
    pre = torch.tensor([3.0, 8, 1, 6, 2, 7, 5, 4])  # two rows of four latents
    assert threshold_of_l0(pre, 4, 1.0) == 6  # above it are 7 and 8, one a row
    assert threshold_of_l0(pre, 4, 0.5) == 7
    assert threshold_of_l0(pre, 4, 4.0) == 1


def test_break_even_by_hand() -> None:
    # The mean row is 0, the centred norms are 3 and 5: the mean squared error of an element counts 1 / (4 * 2).
    assert break_even(torch.tensor([[3.0, 0], [-3, 0], [0, 5], [0, -5]]), 0.5) == pytest.approx(math.sqrt(0.5 * 4 * 2))


def test_break_even_saves_what_it_costs() -> None:
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(dim=0)
    x = 4 * x / x.norm(dim=1, keepdim=True)  # about equal norms, so that each row saves the same
    norm, coefficient = centred_norm(x), 0.01
    activation = break_even(x, coefficient)
    without = x + activation * x / 4  # the error of each row longer by what an active latent would take off
    saved = mean_normalised_error(without, x, norm) - mean_normalised_error(x, x, norm)
    assert saved.item() == pytest.approx(coefficient, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("target", [1.0, 5.0, 40.0])
def test_thresholds_start_at_the_target(scale: float, target: float) -> None:
    sae, x = make(target_l0=target), rows(scale=scale)
    sae.initialize_b_dec(x, "mean")
    assert start_thresholds(sae, x) is None
    assert l0(sae, x) == pytest.approx(target, rel=0.01)
    assert l0(sae, rows(scale=scale, seed=1)) == pytest.approx(target, rel=0.1)


def test_thresholds_of_a_transcoder_and_of_normalised_rows_start_at_the_target() -> None:
    transcoder = make(target_l0=5.0, target_hook_point="blocks.0.hook_mlp_out", d_out=8)
    x, target = rows(), rows(d=8)
    transcoder.initialize_transcoder(x, target, "mean")
    start_thresholds(transcoder, x, target)
    assert l0(transcoder, x) == pytest.approx(5, rel=0.01)
    normalised = make(target_l0=5.0, normalize_activations="layer_norm")
    normalised.initialize_b_dec(x, "mean")
    start_thresholds(normalised, x)
    assert l0(normalised, x) == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"jumprelu_init_l0": 7.0}, 7.0),
        ({"jumprelu_init_l0": 7.0, "target_l0": 20.0}, 7.0),
        ({"jumprelu_init_l0": 7.0, "jumprelu_init_threshold": 3.0}, 7.0),
        ({"jumprelu_init_l0": None}, None),
        ({"jumprelu_init_l0": None, "target_l0": 20.0}, None),
        ({"jumprelu_init_threshold": 3.0, "target_l0": 20.0}, None),
    ],
    ids=str,
)
def test_a_first_l0_or_threshold_that_is_named_is_taken(changes: dict[str, Any], expected: float | None) -> None:
    sae, x = make(l1_coefficient=1e-6, **changes), rows()
    sae.initialize_b_dec(x, "mean")
    start_thresholds(sae, x)
    if expected is None:
        assert torch.allclose(sae.threshold, torch.tensor(changes.get("jumprelu_init_threshold", 0.1)))
    else:
        assert l0(sae, x) == pytest.approx(expected, rel=0.01)


def test_a_larger_coefficient_starts_with_fewer_latents() -> None:
    found = []
    for coefficient in (1e-6, 1e-2, 3e-2, 6e-2, 100.0):
        sae, x = make(l1_coefficient=coefficient), rows()
        sae.initialize_b_dec(x, "mean")
        start_thresholds(sae, x)
        found.append(l0(sae, x))
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(D_SAE / 4, rel=0.01)  # the most, however small the coefficient
    assert found[-1] == pytest.approx(1, rel=0.01)  # the least, so that something is learned


def test_a_coefficient_above_the_whole_loss_is_told() -> None:
    x = rows()
    empty = mean_normalised_error(x.mean(dim=0).expand_as(x), x, centred_norm(x)).item()
    for factor in (0.9, 1.1):
        sae = make(l1_coefficient=factor * empty)
        sae.initialize_b_dec(x, "mean")
        remark = start_thresholds(sae, x)
        assert (remark is None) == (factor < 1)
    assert remark is not None
    assert (
        remark.startswith("l1_coefficient: found ") and f"expected less than {empty:.2g}, the loss of a row" in remark
    )


def test_other_architectures_are_left_alone() -> None:
    for architecture in ("standard", "topk", "gated"):
        sae = make(architecture=architecture, l1_coefficient=100.0)
        before = {name: weight.clone() for name, weight in sae.weights()}
        assert start_thresholds(sae, rows()) is None
        assert all(torch.equal(weight, before[name]) for name, weight in sae.weights())


# ------------------------------------------------------------------------------------------------------- in each step


def code(n_active: int) -> Code:
    """Four rows of which the first `n_active` latents are active."""
    acts = torch.zeros(4, D_SAE)
    acts[:, :n_active] = 2.0
    return Code(acts)


@pytest.mark.parametrize(("n_active", "distance"), [(8, math.log(2)), (4, 0), (2, -math.log(2)), (0, -1), (128, 1)])
def test_thresholds_follow_the_target_together(n_active: int, distance: float) -> None:
    sae = make(target_l0=4.0)
    start = torch.linspace(-1, 1, D_SAE)
    with torch.no_grad():
        sae.log_threshold.copy_(start)
    target = TargetL0(sae.full_cfg, sae.device)
    target.follow(sae, code(n_active), NO)
    after_one = start + distance * (GAIN + GAIN_OF_DRIFT)
    torch.testing.assert_close(sae.log_threshold.detach(), after_one)
    target.follow(sae, code(n_active), NO)  # the drift has grown
    torch.testing.assert_close(sae.log_threshold.detach(), after_one + distance * (GAIN + 2 * GAIN_OF_DRIFT))


def test_a_steady_drift_is_taken_off() -> None:
    """Something lowers all thresholds by 2% a step, where L0 is 40 at threshold 1 and falls with its square."""
    sae = make(target_l0=10.0)
    target, l0_now = TargetL0(sae.full_cfg, sae.device), 0.0
    for _ in range(200):
        with torch.no_grad():
            sae.log_threshold.sub_(0.02)
        l0_now = 40 * sae.threshold[0].item() ** -2
        acts = torch.zeros(1000, D_SAE)
        acts.view(-1)[: min(acts.numel(), round(1000 * l0_now))] = 1.0
        target.follow(sae, Code(acts), NO)
    assert l0_now == pytest.approx(10, rel=0.01)


def test_thresholds_stay_where_there_is_no_target_or_no_finite_loss() -> None:
    for sae, unless in ((make(), NO), (make(target_l0=4.0), ~NO), (make(architecture="topk"), NO)):
        before = {name: weight.clone() for name, weight in sae.weights()}
        target = TargetL0(sae.full_cfg, sae.device)
        target.follow(sae, code(100), unless)
        assert all(torch.equal(weight, before[name]) for name, weight in sae.weights())
        assert target.drift == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 3e-4}, TRAVEL / 500),  # in 500 steps, 3e-4 would take a threshold no further than by a sixth
        ({"lr": 0.02}, 0.02),
        ({"lr": 3e-4, "target_l0": 4.0}, 3e-4),
    ],
)
def test_learning_rate_of_thresholds(changes: dict[str, Any], expected: float) -> None:
    cfg = make(total_training_tokens=500 * 64, train_batch_size=64, lr_warm_up_steps=0, **changes).full_cfg
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    trainer.step(rows(64), 0)
    others, thresholds = trainer.optimizer.param_groups
    assert (others["lr"], thresholds["lr"]) == (changes["lr"], pytest.approx(expected))
    assert threshold_lr(cfg, changes["lr"] / 2) == pytest.approx(expected / 2)


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
@pytest.mark.parametrize(("lr", "start"), [(3e-4, "auto"), (1e-2, "auto"), (3e-4, 40.0)])
def test_a_short_training_ends_at_the_target(optimizer: str, lr: float, start: float | str) -> None:
    changes = {"optimizer": optimizer, "lr": lr, "jumprelu_init_l0": start, "target_l0": 6.0}
    sae = make(train_batch_size=256, total_training_tokens=100 * 256, lr_warm_up_steps=0, **changes)
    trainer = SAETrainer(sae, sae.full_cfg)
    sae.initialize_b_dec(rows(), "mean")
    start_thresholds(sae, rows())
    for step in range(100):
        trainer.step(rows(256, seed=step), step)
    assert l0(sae.eval(), rows(seed=1000)) == pytest.approx(6, rel=0.05)
