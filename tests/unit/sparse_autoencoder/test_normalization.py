from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import fold_input_scale
from sae_training.sparse_autoencoder.normalization import normalize, restore
from sae_training.training.trainer import SAETrainer

MODES = ("layer_norm", "unit_norm")


def test_layer_norm_is_that_of_torch() -> None:
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0)) * 9 + 4
    torch.testing.assert_close(normalize(x, "layer_norm"), torch.nn.functional.layer_norm(x, (32,)))


def test_unit_norm_has_a_unit_mean_square() -> None:
    # (3, 4) has norm 5, and sqrt(2) / 5 times it has norm sqrt(2).
    torch.testing.assert_close(
        normalize(torch.tensor([[3.0, 4.0], [-30.0, 40.0]]), "unit_norm"),
        torch.tensor([[0.6, 0.8], [-0.6, 0.8]]) * 2**0.5,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in", *MODES])
def test_restoring_undoes_it(mode: str) -> None:
    x = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 50 - 3
    torch.testing.assert_close(restore(normalize(x, mode), x, mode), x)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_direction_are_finite(mode: str) -> None:
    x = torch.full((2, 8), 3.0) if mode == "layer_norm" else torch.zeros(2, 8)
    assert torch.equal(normalize(x, mode), torch.zeros(2, 8))


def make(mode: str, **changes: Any) -> SparseAutoencoder:
    values = {"d_in": 16, "d_sae": 32, "architecture": "topk", "k": 4, "device": "cpu", "encoder_matmul_dtype": "auto"}
    values |= {"dtype": torch.float64, "normalize_activations": mode, "expansion_factor": 2, "seed": 0}
    sae = SparseAutoencoder(SimpleNamespace(**values | changes))
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    return sae


def rows(n: int = 40) -> torch.Tensor:
    return torch.randn(n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 7 + 2


@pytest.mark.parametrize("mode", MODES)
def test_the_autoencoder_is_the_plain_one_between_normalising_and_restoring(mode: str) -> None:
    sae, plain, x = make(mode), make("none"), rows()
    small = normalize(x, mode)
    assert torch.equal(sae.encode(x), plain.encode(small))
    torch.testing.assert_close(sae.reconstruct(x), restore(plain.reconstruct(small), x, mode))
    torch.testing.assert_close(sae.decode(sae.encode(x), x), sae.reconstruct(x))
    out, expected = sae(x.view(4, 10, 16)), plain(small)
    torch.testing.assert_close(out.sae_out.flatten(end_dim=1), sae.reconstruct(x))
    torch.testing.assert_close(out.loss, expected.loss)
    with pytest.raises(ValueError, match=f"normalize_activations {mode}, whose inverse needs"):
        sae.decode(sae.encode(x))


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_narrow_model_are_normalised_as_in_training(mode: str) -> None:
    sae, x = make(mode, dtype=torch.float32), (rows() + 20).bfloat16()
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert torch.equal(sae.reconstruct(x), sae.reconstruct(x.float()))


@pytest.mark.parametrize("mode", MODES)
def test_a_scale_cannot_be_folded_into_it(mode: str) -> None:
    with pytest.raises(ValueError, match=f"scale: found 2.0 with normalize_activations {mode}, expected 1"):
        fold_input_scale(make(mode), 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_on_normalised_rows(mode: str, small_config: Callable) -> None:
    sizes = {"d_in": 16, "architecture": "topk", "k": 4, "lr_warm_up_steps": 0, "feature_sampling_method": "l2"}
    x, trainers = rows(64).float(), {}
    for name, given in ((mode, x), ("none", normalize(x, mode))):
        cfg = small_config(**sizes, normalize_activations=name)
        trainer = trainers[name] = SAETrainer(SparseAutoencoder(cfg), cfg)
        trainer.sae.initialize_b_dec(given, "mean")
        for step in range(3):
            trainer.step(given, step, given)  # as the loop does: an autoencoder's target is its input
        trainer.tracker.restart(torch.arange(32))
        trainer.tracker.steps_since_fired[:5] = 10  # dead: the window is 3 steps
        trainer.resample(given, given, 3)
    for (name, weight), (_, expected) in zip(trainers[mode].sae.weights(), trainers["none"].sae.weights(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_transcoder_cannot_undo_it() -> None:
    with pytest.raises(ValueError, match="which a transcoder cannot undo"):
        make("unit_norm", target_hook_point="blocks.0.hook_mlp_out", d_out=16)
