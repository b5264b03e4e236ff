from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.resampling import resample
from sae_training.training.trainer import SAETrainer

DEAD = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([2, 7]), True)


def trained(**changes: Any) -> SAETrainer:
    cfg = LanguageModelSAERunnerConfig(d_in=4, expansion_factor=3, train_batch_size=32, **changes)
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    for step in range(3):
        trainer.step(rows(32, step), step)
    return trainer


def rows(n: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) + 0.3


def run(trainer: SAETrainer, x: torch.Tensor, method: str = "anthropic", dead: torch.Tensor = DEAD) -> int:
    return len(resample(trainer.sae, trainer.by_latent(), dead, x, x, method, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method", ["anthropic", "l2"])
def test_new_directions_are_rows_of_the_data(method: str) -> None:
    trainer, x = trained(), rows(50)
    before = {name: weight.clone() for name, weight in trainer.sae.weights()}
    assert run(trainer, x, method) == 2
    sae = trainer.sae
    units = torch.nn.functional.normalize(x - sae.b_dec.detach(), dim=1)
    cosines = sae.W_dec[DEAD].detach() @ units.T
    torch.testing.assert_close(cosines.max(dim=1).values, torch.ones(2))
    # The encoder is the same direction at 0.2 of the live latents' mean norm.
    norm = 0.2 * before["W_enc"][:, ~DEAD].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, DEAD].T, sae.W_dec[DEAD] * norm)
    assert not sae.b_enc[DEAD].any()
    for name, place in (("W_dec", ~DEAD), ("b_enc", ~DEAD), ("W_enc", (slice(None), ~DEAD))):
        assert torch.equal(dict(sae.weights())[name][place], before[name][place])


def test_optimizer_forgets_the_resampled_latents_and_no_others() -> None:
    trainer = trained()
    run(trainer, rows(50))
    for key, moment in trainer.state_dict()["optimizer"].items():
        if moment.ndim == 0:
            continue
        if key.endswith("b_dec"):
            assert moment.all()
        else:
            assert not moment[DEAD].any()
            assert moment[~DEAD].any()


def test_rows_are_drawn_by_their_squared_error() -> None:
    # Only one row has an error: with everything else reconstructed, it is the one that is drawn.
    trainer = trained()
    sae = trainer.sae
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.zero_()  # reconstructs b_dec
    x = sae.b_dec.detach().repeat(20, 1)
    x[13] += torch.tensor([0.0, 3.0, 0.0, 4.0])
    assert run(trainer, x) == 1
    torch.testing.assert_close(sae.W_dec[2].detach(), torch.tensor([0.0, 0.6, 0.0, 0.8]))


def test_nothing_dead_changes_nothing() -> None:
    trainer = trained()
    before = [weight.clone() for _, weight in trainer.sae.weights()]
    assert run(trainer, rows(50), dead=torch.zeros(12, dtype=torch.bool)) == 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, trainer.sae.weights(), strict=True))


def test_resampled_latents_are_not_dead_until_they_are_silent_again() -> None:
    trainer = trained(feature_sampling_method="l2", dead_feature_window=2)
    trainer.tracker.steps_since_fired[DEAD] = 10
    assert trainer.tracker.dead().sum() == 2
    assert trainer.resample(rows(50), rows(50), step=3) == 2
    assert trainer.tracker.dead().sum() == 0


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_resampled_latents_fire_on_the_row_they_came_from(architecture: str) -> None:
    trainer, x = trained(architecture=architecture, k=4, ema_decay=0.9), rows(50)
    sae = trainer.sae
    with torch.no_grad():
        sae.b_enc[DEAD] = -100
        if architecture == "jumprelu":
            sae.log_threshold[DEAD] = 5
        if architecture == "gated":
            sae.b_mag[DEAD] = -100
    assert not sae.encode(x)[:, DEAD].any()
    run(trainer, x)
    assert sae.encode(x)[:, DEAD].any(dim=0).all()
    assert torch.equal(trainer.average["W_enc"][:, DEAD], sae.W_enc[:, DEAD])


def test_with_fewer_rows_than_dead_latents_the_others_stay_dead() -> None:
    trainer = trained(feature_sampling_method="l2", dead_feature_window=2)
    trainer.tracker.steps_since_fired[DEAD] = 10
    assert trainer.resample(rows(1), rows(1), step=3) == 1
    assert trainer.tracker.dead().sum() == 1
