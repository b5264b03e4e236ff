"""Steps that compute in bfloat16, against the same steps in float32; float16 is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.toy import SAEToyModelRunnerConfig
from sae_training.lm_runner import language_model_sae_runner, resume_run
from sae_training.run.folder import write_config
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Coefficients
from sae_training.toy_model_runner import toy_model_sae_runner
from sae_training.training.metrics import explained_variance
from sae_training.training.mixed_precision import in_dtype
from sae_training.training.trainer import SAETrainer

D_IN, FACTORS, ROWS = 16, 32, 128

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.02, "use_ghost_grads": True},
    "topk": {"k": 3, "auxk_coefficient": 0.25, "auxk_k": 8, "multi_topk": True},
    "batchtopk": {"k": 3},
    "jumprelu": {"l1_coefficient": 0.02, "jumprelu_init_threshold": 0.3, "jumprelu_bandwidth": 0.3},
    "gated": {"l1_coefficient": 0.02},
    "matryoshka": {"k": 3},
}
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make_trainer(architecture: str, **changes: Any) -> SAETrainer:
    sizes = {"d_in": D_IN, "expansion_factor": 4, "train_batch_size": ROWS, "total_training_tokens": 200 * ROWS}
    fields = sizes | {"lr": 1e-3, "lr_warm_up_steps": 0, "dead_feature_window": 20}
    cfg = LanguageModelSAERunnerConfig(
        **{**fields, "architecture": architecture, **ARCHITECTURES[architecture], **changes}
    )
    return SAETrainer(SparseAutoencoder(cfg), cfg)


def rows(seed: int) -> Tensor:
    """Sums of three of 32 directions around a mean far from 0, (ROWS, D_IN)."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(FACTORS, D_IN, generator=torch.Generator().manual_seed(99))
    active = torch.rand(ROWS, FACTORS, generator=generator).topk(3, dim=1).indices
    size = torch.rand(ROWS, 3, 1, generator=generator) + 0.5
    return (size * directions[active]).sum(dim=1) + 20


def trained(architecture: str, n_steps: int = 200, **changes: Any) -> SAETrainer:
    trainer = make_trainer(architecture, **changes)
    trainer.sae.initialize_b_dec(rows(1000), "mean")
    for step in range(n_steps):
        trainer.step(rows(step), step)
    return trainer


def figures(trainer: SAETrainer) -> tuple[float, float]:
    """Explained variance and L0 on rows that were not trained on."""
    x, sae = rows(2000), trainer.sae.eval()
    return explained_variance(x, sae.reconstruct(x)).item(), (sae.encode(x) > 0).sum(dim=1).float().mean().item()


@EACH
def test_weights_moments_and_averages_are_float32(architecture: str) -> None:
    trainer = trained(architecture, n_steps=2, dtype="bfloat16", ema_decay=0.9)
    state = trainer.state_dict()
    tensors = [*state["weights"].values(), *state["optimizer"].values(), *state["average"].values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@EACH
def test_gradients_in_bfloat16_are_those_of_float32_up_to_rounding(architecture: str) -> None:
    """The dense way, which the CPU takes only for batches that are not sparse.

    Ghost gradients are left out: their loss divides by the error of single elements, which magnifies any rounding.
    """
    trainer = trained(architecture, n_steps=60, use_ghost_grads=False)
    sae, x = trainer.sae.train(), rows(5)
    dead = torch.arange(sae.d_sae) % 5 == 0
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        sae.zero_grad()
        losses = in_dtype(dtype, sae, lambda sae: sae.losses(x, x, Coefficients(0.02, sae.k), dead))
        losses.loss.backward()
        assert losses.loss.dtype == losses.sae_out.dtype == torch.float32
        assert losses.feature_acts.dtype == dtype
        gradients[dtype] = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    wide, narrow = gradients.values()
    for name, gradient in wide.items():
        assert narrow[name].dtype == torch.float32
        # Rounded pre-activations open a few gates at other rows, so that not each number is close, but the whole is.
        assert torch.nn.functional.cosine_similarity(narrow[name].flatten(), gradient.flatten(), dim=0) > 0.95, name


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adam8bit", "signum"])
@EACH
def test_every_architecture_and_optimizer_learns_in_bfloat16_as_in_float32(architecture: str, optimizer: str) -> None:
    if optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes")
    (wide_ev, wide_l0), (ev, l0) = (
        figures(trained(architecture, dtype=dtype, optimizer=optimizer)) for dtype in ("float32", "bfloat16")
    )
    assert wide_ev > 0.5
    assert ev == pytest.approx(wide_ev, abs=0.02)
    assert l0 == pytest.approx(wide_l0, rel=0.05)


@EACH
def test_no_update_is_too_small_for_a_weight(architecture: str) -> None:
    """lr 1e-5 is far below the distance of bfloat16's numbers near 0.3, which is 1/512."""
    before = {name: weight.clone() for name, weight in make_trainer(architecture).sae.weights()}
    trainer = make_trainer(architecture, dtype="bfloat16", lr=1e-5)
    for step in range(3):
        trainer.step(rows(step) - 20, step)
    after = dict(trainer.sae.weights())
    trained = [name for name, gradient in moments_of(trainer).items() if gradient.any()]
    assert {"W_enc", "W_dec", "b_dec"} <= {*trained}
    assert "log_threshold" in trained or architecture != "jumprelu"
    for name in trained:
        moved = (after[name] - before[name]).abs()
        assert 0 < moved.max() < (0.1 if name == "log_threshold" else 1e-4), name  # thresholds have a larger rate


def moments_of(trainer: SAETrainer) -> dict[str, Tensor]:
    prefix = "exp_avg."
    state = trainer.state_dict()["optimizer"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# -------------------------------------------------------------------------------------------------------------- float16

MESSAGE = "dtype: found float16, expected float32, bfloat16 or float64 to train in"


def test_a_trainer_refuses_float16() -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        make_trainer("topk", dtype="float16")


def test_a_run_in_float16_is_refused_before_its_language_model_is_loaded(small_config: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        language_model_sae_runner(small_config(dtype="float16", model_name="no such model"))
    assert not (tmp_path / "runs").exists()


def test_an_old_run_in_float16_is_not_continued(small_config: Any, tmp_path: Any) -> None:
    write_config(tmp_path, small_config(dtype="float16"))
    with pytest.raises(ValueError, match=MESSAGE):
        resume_run(tmp_path)


def test_a_toy_run_refuses_float16() -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        toy_model_sae_runner(SAEToyModelRunnerConfig(dtype="float16"))  # pyright: ignore[reportArgumentType]


@EACH
def test_saved_float16_autoencoders_load_in_float32_and_can_be_narrowed(architecture: str, tmp_path: Any) -> None:
    sae = make_trainer(architecture).sae
    sae.full_cfg.dtype = sae.cfg.dtype = torch.float16
    sae.half().save_model(tmp_path)
    loaded = SparseAutoencoder.load_from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert loaded.reconstruct(rows(0).half()).dtype == torch.float32
    assert loaded.bfloat16().reconstruct(rows(0)).dtype == torch.bfloat16
