"""Steps on an "mps" device, which exists in `fake_mps` only: nothing in them may need what Apple's GPU lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_mps import OnMps, fake_mps, has_kernel
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.metrics import sparsity_metrics, training_metrics
from sae_training.training.thresholds import start_thresholds
from sae_training.training.trainer import SAETrainer

D_IN, ROWS, STEPS = 8, 64, 6
CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "ghost": {"architecture": "standard", "use_ghost_grads": True, "clip_grad_norm": 1.0},
    "topk": {"architecture": "topk", "auxk_coefficient": 0.1, "optimizer": "signum"},
    "multi topk": {"architecture": "topk", "multi_topk": True, "ema_decay": 0.9},
    "batchtopk": {"architecture": "batchtopk", "micro_batch_size": 32},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 4.0},
    "gated": {"architecture": "gated", "feature_sampling_method": "anthropic"},
    "matryoshka": {"architecture": "matryoshka", "matryoshka_widths": (8, 32), "feature_sampling_method": "l2"},
    "transcoder": {"architecture": "topk", "target_hook_point": "other", "d_out": D_IN, "skip_connection": True},
    "bfloat16": {"architecture": "topk", "dtype": "bfloat16", "feature_sampling_method": "l2"},
}


def trained(device: str, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights after a few steps with resampling, a restart from the saved state included, and the last figures."""
    cfg = LanguageModelSAERunnerConfig(
        d_in=D_IN, expansion_factor=8, train_batch_size=ROWS, total_training_tokens=ROWS * STEPS, lr=1e-2,
        lr_scheduler_name="constant", encoder_matmul_dtype="float32", dead_feature_window=1, device=device,
        **{"k": 2, **options},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(STEPS, ROWS, D_IN, generator=generator).to(device)
    sae = SparseAutoencoder(cfg)
    sae.initialize_b_dec(rows[0], "geometric_median")
    start_thresholds(sae, rows[0], rows[0])
    trainer, figures = SAETrainer(sae, cfg), {}
    for step, x in enumerate(rows):
        target = x if cfg.target_hook_point is None else x.flip(1)
        result = trainer.step(x, step, target)
        figures = training_metrics(result, trainer.tracker, step) | sparsity_metrics(trainer.tracker.log_frequency(), 0)
        if cfg.feature_sampling_method and step % 2:
            trainer.tracker.steps_since_fired[:3] = 9  # makes three of them dead
            assert trainer.resample(x, target, step) >= 3
        again = SAETrainer(SparseAutoencoder(cfg), cfg)
        again.load_state_dict(trainer.state_dict())
        trainer = again
    trainer.take_average()
    trainer.check_finite()
    trainer.check_weights()
    return {name: weight.detach().cpu() for name, weight in trainer.sae.weights()}, figures


@pytest.mark.parametrize("case", CASES)
def test_steps_on_mps_train_what_steps_on_the_processor_train(case: str) -> None:
    weights, figures = trained("cpu", **CASES[case])
    with fake_mps():
        found, found_figures = trained("mps", **CASES[case])
    assert found_figures == pytest.approx(figures, rel=0.2 if case == "bfloat16" else 1e-3, abs=1e-3, nan_ok=True)
    if case == "bfloat16":  # where the two ways of a step round differently, and choose other latents
        return
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_a_loss_that_is_not_finite_changes_no_weight_on_mps(optimizer: Any) -> None:
    cfg = LanguageModelSAERunnerConfig(d_in=D_IN, expansion_factor=2, device="mps", optimizer=optimizer)
    with fake_mps():
        sae = SparseAutoencoder(cfg)
        trainer = SAETrainer(sae, cfg)
        before = {name: weight.detach().cpu().clone() for name, weight in sae.weights()}
        trainer.step(torch.full((4, D_IN), torch.nan, device="mps"), 0)
        assert all(torch.equal(weight.detach().cpu(), before[name]) for name, weight in sae.weights())
        trainer.step(torch.randn(4, D_IN, device="mps"), 1)
        assert not torch.equal(sae.W_dec.detach().cpu(), before["W_dec"])


def test_the_device_refuses_what_a_mac_refuses() -> None:
    """The fake itself: without these, the tests above would show nothing."""
    with fake_mps():
        x = torch.arange(4.0, device="mps")
        assert isinstance(x, OnMps) and x.device == torch.device("mps:0") and x.tolist() == [0, 1, 2, 3]
        for wrong in (
            lambda: x.double(),
            lambda: x.sum(dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.zeros(2, dtype=torch.float64).to("mps"),
            lambda: torch.tensor([0.5], dtype=torch.float64, device="mps"),
            lambda: x.cpu().numpy() is None or x.numpy(),
        ):
            with pytest.raises(TypeError):
                wrong()
        for wrong in (
            lambda: x + torch.ones(4),
            lambda: torch.rand(2, device="mps", generator=torch.Generator()),
            lambda: torch.special.ndtri(x),
        ):
            with pytest.raises(RuntimeError):
                wrong()
    assert has_kernel("aten::_fused_adam_", "") and not has_kernel("aten::special_ndtri", "")
