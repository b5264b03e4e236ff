from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.run.checkpoint import read_part, save_checkpoint
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training import trainer as trainer_module
from sae_training.training.metrics import training_metrics
from sae_training.training.trainer import NonFiniteLoss, SAETrainer

D_IN, D_SAE, ROWS = 6, 12, 32

# 1000 steps of 32 rows, without warm-up.
SMALL: dict[str, Any] = {
    "d_in": D_IN,
    "expansion_factor": 2,
    "k": 3,
    "train_batch_size": ROWS,
    "total_training_tokens": 1000 * ROWS,
    "lr": 1e-3,
    "lr_warm_up_steps": 0,
    "l1_coefficient": 0.02,
    "log_to_wandb": False,
}


def make_trainer(**changes: Any) -> SAETrainer:
    cfg = LanguageModelSAERunnerConfig(**{**SMALL, **changes})
    return SAETrainer(SparseAutoencoder(cfg), cfg)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different norms around a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, D_IN, generator=generator) * torch.linspace(0.5, 2, ROWS).unsqueeze(1) + 0.7
    return x.to(dtype)


def parameters(trainer: SAETrainer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainer.sae.weights()}


def moments(trainer: SAETrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state_dict()["optimizer"].items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ARCHITECTURES = pytest.mark.parametrize("architecture", ["standard", "topk"])
REMEDIES = pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "standard"},
        {"architecture": "standard", "use_ghost_grads": True, "dead_feature_window": 1},
        {"architecture": "topk"},
        {"architecture": "topk", "auxk_coefficient": 0.5, "auxk_k": 2, "dead_feature_window": 1},
    ],
    ids=["standard", "ghost", "topk", "auxk"],
)


# ----------------------------------------------------------------------------------------------------- what a step does


@ARCHITECTURES
def test_loss_falls_in_every_step_on_the_same_batch(architecture: str) -> None:
    trainer, x = make_trainer(architecture=architecture), batch()
    losses = [trainer.step(x, step).out.loss.item() for step in range(20)]
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False))


@ARCHITECTURES
def test_decoder_rows_have_unit_norm_after_every_step(architecture: str) -> None:
    trainer = make_trainer(architecture=architecture, lr=0.1)
    for step in range(5):
        trainer.step(batch(step), step)
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_learning_rate_warms_up_as_configured() -> None:
    trainer = make_trainer(lr_warm_up_steps=4)
    used = [trainer.step(batch(), step).lr for step in range(6)]
    assert used == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert trainer.optimizer.param_groups[0]["lr"] == used[-1]


def test_first_adam_step_is_as_long_as_the_learning_rate() -> None:
    # m / sqrt(v) is +-1 in Adam's first step; b_enc has no constraint that would change it afterwards.
    trainer = make_trainer(lr_warm_up_steps=4)
    trainer.step(batch(), 0)
    torch.testing.assert_close(trainer.sae.b_enc.abs(), torch.full((D_SAE,), 2.5e-4), rtol=1e-3, atol=0)


def test_cosine_ends_at_lr_end() -> None:
    trainer = make_trainer(lr_scheduler_name="cosineannealing", lr_end=2e-4)
    assert [trainer.lr(step) for step in (0, 500, 1000)] == pytest.approx([1e-3, 6e-4, 2e-4])


def test_l1_coefficient_warms_up_as_configured() -> None:
    trainer = make_trainer(l1_warm_up_steps=4)
    results = [trainer.step(batch(), step) for step in range(6)]
    assert [result.l1_coefficient for result in results] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02])
    first = results[0].out
    assert first.l1_loss.item() == pytest.approx(0.005 * first.feature_acts.sum(dim=1).mean().item())


def test_clipping_bounds_the_norm_of_the_gradient() -> None:
    def gradient_norm(clip: float | None) -> float:
        trainer = make_trainer(clip_grad_norm=clip)
        squares: list[float] = []

        def look(*_: object) -> None:
            squares.extend(p.grad.pow(2).sum().item() for p in trainer.sae.parameters() if p.grad is not None)

        trainer.optimizer.register_step_pre_hook(look)
        trainer.step(batch(), 0)
        return math.sqrt(sum(squares))

    free = gradient_norm(None)
    assert gradient_norm(free / 10) == pytest.approx(free / 10, rel=1e-4)
    assert gradient_norm(free * 10) == pytest.approx(free)


PARTS = ["topk", "standard", "gated", "jumprelu"]


@pytest.mark.parametrize("architecture", PARTS)
def test_parts_have_the_gradient_of_the_whole_batch(architecture: str) -> None:
    def gradients(micro: int | None) -> tuple[dict[str, torch.Tensor], Any]:
        trainer = make_trainer(architecture=architecture, micro_batch_size=micro, dtype="float64")
        found: dict[str, torch.Tensor] = {}

        def look(*_: object) -> None:
            found.update({n: p.grad.clone() for n, p in trainer.sae.named_parameters() if p.grad is not None})

        trainer.optimizer.register_step_pre_hook(look)
        return found, trainer.step(batch().double() * 3 + 1, 0)

    (whole, result), (parts, of_parts) = gradients(None), gradients(12)  # parts of 12, 12, 8
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_parts.out.sae_out, result.out.sae_out)
    for one, other in zip(of_parts.out.scalars(), result.out.scalars(), strict=True):
        torch.testing.assert_close(one, other)
    for figure in ("l0", "l1", "counts", "smallest_active"):
        whole_figure = getattr(result.out.code, figure)()
        found = getattr(of_parts.out.code, figure)()
        assert found >= whole_figure if figure == "smallest_active" else torch.allclose(found, whole_figure)


def test_accumulated_batches_are_one_larger_batch() -> None:
    one = make_trainer(architecture="topk", train_batch_size=32)
    other = make_trainer(architecture="topk", train_batch_size=8, grad_acc_steps=4)
    for step in range(3):
        one.step(batch(), step)
        other.step(batch(), step)
    for (name, weight), (_, accumulated) in zip(one.sae.weights(), other.sae.weights(), strict=True):
        torch.testing.assert_close(accumulated, weight, rtol=1e-3, atol=1e-4, msg=name)


def test_no_more_rows_than_a_part_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = trainer_module.objective

    def watched(sae: Any, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(len(x))
        return real(sae, x, *rest, **named)

    monkeypatch.setattr(trainer_module, "objective", watched)
    make_trainer(micro_batch_size=12).step(batch(), 0)
    assert sizes == [12, 12, 8]


def test_result_is_detached_and_holds_the_batch() -> None:
    x = batch()
    result = make_trainer().step(x, 0)
    assert result.target is x
    tensors = [result.out.sae_out, result.out.code.values, result.out.loss, result.out.mse_loss]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_tracker_counts_the_steps_activations() -> None:
    trainer = make_trainer()
    result = trainer.step(batch(), 0)
    assert torch.equal(trainer.tracker.fired, (result.out.feature_acts > 0).sum(dim=0))
    assert trainer.tracker.window_tokens == ROWS


@pytest.mark.parametrize(("dtype", "of_weights"), [("bfloat16", "float32"), ("float64", "float64")])
def test_step_in_other_precisions_learns(dtype: str, of_weights: str) -> None:
    trainer = make_trainer(dtype=dtype, lr=1e-2)
    losses = [trainer.step(batch(), step).out.loss.item() for step in range(30)]
    assert losses[-1] < losses[0]
    assert {weight.dtype for _, weight in trainer.sae.weights()} == {getattr(torch, of_weights)}


# --------------------------------------------------------------------------------- the same step, written out plainly


class PlainTrainer:
    """The training step by formula, dense and with autograd, for a few latents."""

    def __init__(self, trainer: SAETrainer) -> None:
        self.cfg = trainer.cfg
        self.weights = {name: weight.clone().requires_grad_() for name, weight in trainer.sae.weights()}
        self.optimizer = torch.optim.Adam(self.weights.values(), betas=(0.9, 0.999), fused=False, foreach=False)
        self.silent_steps = torch.zeros(D_SAE)

    def step(self, x: Tensor, lr: float, l1_coefficient: float) -> tuple[float, float]:
        """Loss, and the part of it that revives dead latents."""
        dead = self.silent_steps > self.cfg.dead_feature_window
        W = self.weights
        pre = (x - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
        acts = pre.clamp_min(0)
        if self.cfg.architecture == "topk":
            threshold = pre.sort(dim=1, descending=True).values[:, self.cfg.k - 1 : self.cfg.k]
            acts = acts * (pre >= threshold)
        out = acts @ W["W_dec"] + W["b_dec"]
        spread = (x - x.mean(dim=0)).norm(dim=1, keepdim=True)
        mse = (out - x) ** 2 / spread
        remedy, l1 = torch.zeros(()), torch.zeros(())
        if dead.any() and self.cfg.use_ghost_grads:
            remedy = self.ghost(x, out.detach(), pre[:, dead], W["W_dec"][dead], mse.detach())
        if dead.any() and self.cfg.auxk_coefficient:
            remedy = float(self.cfg.auxk_coefficient) * self.auxk(x, out.detach(), pre, W["W_dec"], dead)
        if self.cfg.architecture == "standard":
            l1 = l1_coefficient * acts.sum(dim=1).mean()
        loss = mse.mean() + l1 + remedy

        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = W["W_dec"].grad
            assert gradient is not None
            for latent, direction in enumerate(W["W_dec"]):
                gradient[latent] -= (gradient[latent] @ direction) * direction
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            W["W_dec"] /= W["W_dec"].norm(dim=1, keepdim=True)
        self.silent_steps = torch.where((acts > 0).any(dim=0), 0, self.silent_steps + 1)
        return loss.item(), remedy.item()

    def ghost(self, x: Tensor, out: Tensor, dead_pre: Tensor, dead_dec: Tensor, mse: Tensor) -> Tensor:
        residual = x - out
        ghost = dead_pre.exp() @ dead_dec
        half = residual.norm(dim=1, keepdim=True) / (2 * ghost.detach().norm(dim=1, keepdim=True) + 1e-6)
        spread = (residual - residual.mean(dim=0)).norm(dim=1, keepdim=True)
        error = (ghost * half - residual) ** 2 / spread
        return (error * (mse / (error.detach() + 1e-6))).mean()

    def auxk(self, x: Tensor, out: Tensor, pre: Tensor, W_dec: Tensor, dead: Tensor) -> Tensor:
        error = x - out
        rows = []
        for row in pre:
            top = [latent for latent in row.argsort(descending=True).tolist() if dead[latent]][: self.cfg.auxk_k]
            rows.append(row[top].clamp_min(0) @ W_dec[top])
        ratio = ((torch.stack(rows) - error) ** 2).mean() / ((error - error.mean(dim=0)) ** 2).mean()
        centred = x - x.mean(dim=0)
        return ratio * (centred**2 / centred.norm(dim=1, keepdim=True)).mean()


@REMEDIES
def test_steps_are_those_of_the_plain_formulas(changes: dict[str, Any]) -> None:
    # Several steps, as the first of Adam does not depend on the scale of the gradient. A third of the latents begin far
    # from firing, and the window of one silent step makes them dead from the third step on.
    trainer = make_trainer(dtype="float64", lr_warm_up_steps=3, l1_warm_up_steps=4, **changes)
    with torch.no_grad():
        trainer.sae.b_enc[::3] = -4.0
        trainer.sae.b_dec.copy_(batch(99, torch.float64).mean(dim=0))
    plain = PlainTrainer(trainer)
    has_remedy = "use_ghost_grads" in changes or "auxk_coefficient" in changes
    for step in range(6):
        x = batch(step, torch.float64)
        out = trainer.step(x, step).out
        loss, remedy = plain.step(x, lr=1e-3 * min(1, (step + 1) / 3), l1_coefficient=0.02 * min(1, (step + 1) / 4))
        assert out.loss.item() == pytest.approx(loss, rel=1e-6)
        assert out.ghost_grad_loss.item() == pytest.approx(remedy, rel=1e-6)
        assert (remedy > 0) == (has_remedy and step >= 2)
        for name, weight in trainer.sae.weights():
            torch.testing.assert_close(weight, plain.weights[name].detach(), rtol=0, atol=1e-6)


def test_dead_latents_learn_by_their_remedy_alone() -> None:
    def moved(**changes: Any) -> bool:
        trainer = make_trainer(dead_feature_window=1, **changes)
        with torch.no_grad():
            trainer.sae.b_enc[0] = -20.0
        before = trainer.sae.W_enc[:, 0].clone()
        for step in range(4):
            trainer.step(batch(step), step)
        return not torch.equal(trainer.sae.W_enc[:, 0], before)

    assert moved(use_ghost_grads=True)
    assert not moved()


# ----------------------------------------------------------------------------------------------------------- not finite


def step_into(value: float, changes: dict[str, Any]) -> tuple[SAETrainer, dict[str, Tensor], dict[str, Tensor]]:
    """A trainer after three good steps and one on a batch with `value` in it; weights and moments before that one."""
    trainer = make_trainer(clip_grad_norm=1.0, **changes)
    for step in range(3):
        trainer.step(batch(step), step)
    trainer.check_finite()
    before = parameters(trainer), moments(trainer)
    x = batch(9)
    x[3, 2] = value
    trainer.step(x, 3)
    return trainer, *before


NOT_FINITE = pytest.mark.parametrize("value", [float("nan"), float("inf")])


@NOT_FINITE
@REMEDIES
def test_loss_that_is_not_finite_leaves_the_weights_bit_for_bit(changes: dict[str, Any], value: float) -> None:
    trainer, weights, _ = step_into(value, changes)
    after = parameters(trainer)
    assert [name for name in weights if not torch.equal(after[name], weights[name])] == []


@NOT_FINITE
@REMEDIES
def test_loss_that_is_not_finite_leaves_adams_moments_bit_for_bit(changes: dict[str, Any], value: float) -> None:
    trainer, _, before = step_into(value, changes)
    assert equal(moments(trainer), before)


@NOT_FINITE
def test_loss_that_is_not_finite_is_told(value: float) -> None:
    trainer, _, _ = step_into(value, {})
    with pytest.raises(NonFiniteLoss, match="the loss is not finite"):
        trainer.check_finite()


def test_a_loss_that_was_not_finite_is_remembered() -> None:
    trainer = make_trainer()
    trainer.step(batch() * float("nan"), 0)
    trainer.step(batch(), 1)
    with pytest.raises(NonFiniteLoss):
        trainer.check_finite()


def test_finite_steps_pass_the_checks() -> None:
    trainer = make_trainer()
    before = parameters(trainer)
    trainer.step(batch(), 0)
    trainer.check_finite()
    trainer.check_weights()
    assert trainer.non_finite.item() == 0
    assert all(not torch.equal(weight, before[name]) for name, weight in trainer.sae.weights())


def test_weight_that_is_not_finite_is_named() -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.sae.b_enc[2] = float("inf")
    with pytest.raises(NonFiniteLoss, match="b_enc holds values that are not finite"):
        trainer.check_weights()


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "standard"},
        {"architecture": "standard", "use_ghost_grads": True, "dead_feature_window": 1},
        {"architecture": "topk", "k_anneal_steps": 6},
        {"architecture": "topk", "auxk_coefficient": 0.5, "auxk_k": 2, "dead_feature_window": 1},
        {"architecture": "topk", "optimizer": "signum"},
        {"architecture": "topk", "optimizer": "adam8bit"},
        {"architecture": "topk", "ema_decay": 0.9},
        {"architecture": "batchtopk"},
        {"architecture": "jumprelu"},
        {"architecture": "jumprelu", "target_l0": 4.0},
        {"architecture": "gated"},
        {"architecture": "matryoshka"},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_restored_trainer_goes_on_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    one, other = make_trainer(**changes), make_trainer(**{**changes, "seed": 7})
    for step in range(4):
        one.step(batch(step), step)
    folder = save_checkpoint(tmp_path, 4, {"trainer": one.state_dict()}, {}, {})
    other.load_state_dict(read_part(folder, "trainer"))
    for step in range(4, 7):
        for trainer in (one, other):
            trainer.step(batch(step), step)
        assert equal(parameters(one), parameters(other))
        assert equal(moments(one), moments(other))
        assert equal(one.tracker.state_dict(), other.tracker.state_dict())
        assert equal(one.average, other.average)


@REMEDIES
def test_logging_changes_nothing(changes: dict[str, Any]) -> None:
    quiet, logged = make_trainer(**changes), make_trainer(**changes)
    for step in range(5):
        quiet.step(batch(step), step)
        result = logged.step(batch(step), step)
        training_metrics(result, logged.tracker, (step + 1) * ROWS)
        logged.tracker.log_frequency()
    assert equal(parameters(quiet), parameters(logged))
    assert equal(moments(quiet), moments(logged))


def test_average_of_the_weights_follows_the_formula_and_is_taken_at_the_end() -> None:
    trainer = make_trainer(ema_decay=0.5)
    expected = trainer.sae.b_enc.detach().clone()
    for step in range(4):
        trainer.step(batch(step), step)
        decay = min(0.5, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * trainer.sae.b_enc.detach()
    last = trainer.sae.b_enc.detach().clone()
    trainer.take_average()
    torch.testing.assert_close(trainer.sae.b_enc.detach(), expected)
    assert not torch.equal(trainer.sae.b_enc.detach(), last)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_without_an_average_the_last_weights_stay() -> None:
    trainer = make_trainer()
    trainer.step(batch(), 0)
    before = parameters(trainer)
    trainer.take_average()
    assert equal(before, parameters(trainer))


def test_as_many_latents_as_inputs_train_by_the_plain_formula() -> None:
    # W_enc is square then, and its transpose is no longer seen by its shape.
    trainer = make_trainer(expansion_factor=1, lr=0.1)
    before = trainer.sae.W_enc.detach().clone()
    gradients: list[torch.Tensor] = []
    W_enc = trainer.sae.W_enc
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.extend(g for g in [W_enc.grad] if g is not None))
    trainer.step(batch(), 0)
    (gradient,) = gradients
    # Adam's first step is lr along the sign of the gradient.
    torch.testing.assert_close(trainer.sae.W_enc.detach() - before, -0.1 * gradient.sign(), rtol=1e-3, atol=1e-5)
