from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.kernels.sparse_code import Code
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import track_inference_threshold

Config = LanguageModelSAERunnerConfig


def small(**changes) -> SparseAutoencoder:
    return SparseAutoencoder(Config(**{"d_in": 4, "expansion_factor": 3, "k": 2, "train_batch_size": 64, **changes}))


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(0))


ARCHITECTURES = pytest.mark.parametrize("architecture", ["standard", "topk"])


def test_parameters_have_the_shapes_of_the_contract() -> None:
    shapes = {name: tuple(p.shape) for name, p in small().named_parameters()}
    assert shapes == {"W_enc": (4, 12), "b_enc": (12,), "W_dec": (12, 4), "b_dec": (4,)}


@ARCHITECTURES
def test_new_decoder_rows_have_unit_norm_and_biases_are_zero(architecture: str) -> None:
    sae = small(architecture=architecture)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_encoder_starts_as_the_decoder_transposed_in_memory_of_its_own(architecture: str) -> None:
    sae = small(architecture=architecture)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    with torch.no_grad():
        sae.W_enc.zero_()
    assert sae.W_dec.all()


def test_seed_decides_the_initial_weights() -> None:
    assert torch.equal(small(seed=1).W_enc, small(seed=1).W_enc)
    assert not torch.equal(small(seed=1).W_enc, small(seed=2).W_enc)


def test_standard_forward_by_hand() -> None:
    sae = SparseAutoencoder(Config(d_in=2, expansion_factor=1, l1_coefficient=0.5, k=1))
    sae.load_state_dict(
        {
            "W_enc": torch.tensor([[1.0, -1.0], [0.0, 2.0]]),
            "b_enc": torch.tensor([0.5, 0.0]),
            "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
            "b_dec": torch.tensor([1.0, 0.0]),
        }
    )
    # x - b_dec: (1, 1) and (-1, 0). Pre-activations: (1.5, 1) and (-0.5, 1). Outputs: (2.5, 1) and (1, 1).
    x = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    out = sae(x)
    torch.testing.assert_close(out.feature_acts, torch.tensor([[1.5, 1.0], [0.0, 1.0]]))
    torch.testing.assert_close(out.sae_out, torch.tensor([[2.5, 1.0], [1.0, 1.0]]))
    # Mean row (1, 0.5); both rows are sqrt(1.25) from it. Squared errors 0.25, 0, 1, 1.
    assert out.mse_loss.item() == pytest.approx(2.25 / 4 / math.sqrt(1.25))
    assert out.l1_loss.item() == pytest.approx(0.5 * (2.5 + 1.0) / 2)
    assert out.ghost_grad_loss.item() == 0
    assert out.loss.item() == pytest.approx(out.mse_loss.item() + out.l1_loss.item())


def test_forward_unpacks_into_six_in_the_order_of_old_notebooks() -> None:
    sae_out, feature_acts, loss, mse_loss, l1_loss, ghost_grad_loss = small()(rows(5))
    assert sae_out.shape == (5, 4)
    assert feature_acts.shape == (5, 12)
    assert loss.shape == mse_loss.shape == l1_loss.shape == ghost_grad_loss.shape == ()


def test_topk_keeps_the_k_largest_positive_pre_activations() -> None:
    sae = small(architecture="topk", k=3)
    x = rows(50)
    acts, pre = sae.encode(x), (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    for row_acts, row_pre in zip(acts, pre, strict=True):
        largest = sorted(row_pre.tolist(), reverse=True)[:3]
        assert sorted(row_acts[row_acts > 0].tolist()) == sorted(v for v in largest if v > 0)


def test_topk_never_passes_a_negative_pre_activation() -> None:
    sae = small(architecture="topk", k=12)
    assert (sae.encode(rows(50)) >= 0).all()


@ARCHITECTURES
def test_three_dimensions_equal_the_same_rows_flat(architecture: str) -> None:
    sae, x = small(architecture=architecture), rows(3, 5)
    deep, flat = sae(x), sae(x.flatten(end_dim=1))
    assert deep.sae_out.shape == (3, 5, 4)
    torch.testing.assert_close(deep.sae_out.flatten(end_dim=1), flat.sae_out)
    for one, other in zip(deep[2:], flat[2:], strict=True):
        torch.testing.assert_close(one, other)


@ARCHITECTURES
def test_one_dimension_equals_a_batch_of_one_and_is_finite(architecture: str) -> None:
    sae, x = small(architecture=architecture), rows()
    single, batch = sae(x), sae(x.unsqueeze(0))
    assert single.sae_out.shape == (4,)
    torch.testing.assert_close(single.sae_out, batch.sae_out[0])
    torch.testing.assert_close(single.loss, batch.loss)
    assert single.loss.isfinite()


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_runs_in_the_dtype_of_the_weights(architecture: str, dtype: torch.dtype) -> None:
    out = small(architecture=architecture).to(dtype)(rows(5))
    assert out.sae_out.dtype == dtype


@pytest.mark.parametrize(("dtype", "of_weights"), [("float32", "float32"), ("bfloat16", "float32"), ("float64",) * 2])
def test_weights_are_float32_at_least(dtype: str, of_weights: str) -> None:
    assert small(dtype=dtype).dtype == getattr(torch, of_weights)


@pytest.mark.parametrize("remedy", [{"use_ghost_grads": True}, {"auxk_coefficient": 1 / 32, "auxk_k": 2}])
@ARCHITECTURES
def test_remedy_gives_dead_encoder_columns_a_gradient_and_live_ones_none(remedy: dict, architecture: str) -> None:
    sae, x = small(architecture=architecture, **remedy), rows(40)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 7]] = True
    sae(x, dead).ghost_grad_loss.backward()
    reached = sae.W_enc.grad.abs().sum(dim=0) > 0
    assert reached.tolist() == dead.tolist()
    assert (sae.b_enc.grad != 0).tolist() == dead.tolist()
    assert (sae.W_dec.grad.abs().sum(dim=1) > 0).tolist() == dead.tolist()


@pytest.mark.parametrize("mask", [None, torch.zeros(12, dtype=torch.bool)], ids=["no mask", "none dead"])
def test_remedy_loss_is_zero_with_nothing_dead(mask: torch.Tensor | None) -> None:
    assert small(use_ghost_grads=True)(rows(5), mask).ghost_grad_loss.item() == 0


def test_remedy_loss_is_zero_outside_training() -> None:
    sae = small(use_ghost_grads=True).eval()
    assert sae(rows(5), torch.ones(12, dtype=torch.bool)).ghost_grad_loss.item() == 0


def test_wrong_width_names_both() -> None:
    with pytest.raises(ValueError, match=r"with d_in = 4"):
        small()(torch.zeros(2, 3))


def test_hook_points_see_and_change_the_pass() -> None:
    sae, x = small(), rows(5)
    _, cache = sae.run_with_cache(x)
    assert set(cache) == {"hook_sae_in", "hook_hidden_pre", "hook_hidden_post", "hook_sae_out"}
    silenced = sae.run_with_hooks(x, fwd_hooks=[("hook_hidden_post", lambda acts, hook: acts * 0)])
    torch.testing.assert_close(silenced.sae_out, sae.b_dec.expand(5, 4))


def test_removed_gradient_is_the_part_parallel_to_the_row() -> None:
    sae = small()
    sae(rows(20)).loss.backward()
    before, weights = sae.W_dec.grad.clone(), sae.W_dec.detach().clone()
    sae.remove_gradient_parallel_to_decoder_directions()
    torch.testing.assert_close((sae.W_dec.grad * weights).sum(dim=1), torch.zeros(12), atol=1e-6, rtol=0)
    removed = before - sae.W_dec.grad
    torch.testing.assert_close(removed, (removed * weights).sum(dim=1, keepdim=True) * weights)
    assert torch.equal(sae.W_dec.detach(), weights)


def test_unit_norm_leaves_a_row_of_zeros_at_zero() -> None:
    sae = small()
    with torch.no_grad():
        sae.W_dec *= 3
        sae.W_dec[0] = 0
    sae.set_decoder_norm_to_unit_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.tensor([0.0] + [1.0] * 11))


def test_b_dec_initialisation_by_mean_and_zeros_and_an_unknown_name() -> None:
    sae, x = small(), rows(9)
    sae.initialize_b_dec(x, "mean")
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(dim=0))
    sae.initialize_b_dec(x, "zeros")
    assert not sae.b_dec.any()
    with pytest.raises(ValueError, match="geometric_median"):
        sae.initialize_b_dec(x, "median")


def test_name_holds_model_hook_and_width_and_the_head_if_one() -> None:
    assert small().get_name() == "sparse_autoencoder_gelu-2l_blocks.0.hook_mlp_out_12"
    head = small(hook_point="blocks.0.attn.hook_z", hook_point_head_index=0)
    assert head.get_name() == "sparse_autoencoder_gelu-2l_blocks.0.attn.hook_z_head0_12"


def test_name_takes_the_layer_into_the_hook_and_of_a_local_model_its_folder() -> None:
    sae = small(hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer=3, model_name="/models/tiny")
    assert sae.get_name() == "sparse_autoencoder_tiny_blocks.3.hook_resid_pre_12"


def test_a_duck_typed_config_of_the_mats_era_is_enough(tmp_path: Path) -> None:
    cfg = SimpleNamespace(
        model_name="m", hook_point="h", d_in=4, d_sae=12, l1_coefficient=1e-3, dtype=torch.float32, device="cpu", seed=1
    )
    sae = SparseAutoencoder(cfg)
    assert sae(rows(3)).loss.isfinite()
    sae.cfg.expansion_factor = 3
    sae.save_model(tmp_path / "sae")
    assert torch.equal(SparseAutoencoder.load_from_pretrained(tmp_path / "sae").W_enc, sae.W_enc)


# ------------------------------------------------------------------------------------------------------------ batchtopk


def test_batchtopk_outside_training_codes_a_row_by_its_threshold_alone() -> None:
    sae = small(architecture="batchtopk").eval()
    sae.inference_threshold.fill_(0.3)
    x = rows(50)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode(x), torch.where(pre > 0.3, pre, 0.0))
    torch.testing.assert_close(sae.encode(x)[7], sae.encode(x[7]))


def test_batchtopk_follows_the_smallest_activation_of_training_batches() -> None:
    sae = small(architecture="batchtopk")
    acts = [torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 5.0], [0.0, 0.0]]), torch.zeros(2, 2)]
    for step, values in enumerate(acts):
        track_inference_threshold(sae, Code(values), step)
    # The first batch sets it to 2, the second weighs 1/2; a batch without any activation leaves it.
    assert sae.inference_threshold.item() == pytest.approx(1.5)


def test_batchtopk_comes_back_with_its_threshold_ready_for_inference(tmp_path: Path) -> None:
    sae = small(architecture="batchtopk")
    sae.inference_threshold.fill_(0.3)
    sae.save_model(tmp_path)
    loaded = SparseAutoencoder.load_from_pretrained(tmp_path)
    assert not loaded.training
    torch.testing.assert_close(loaded.encode(rows(9)), sae.eval().encode(rows(9)))


def test_matryoshka_without_widths_halves_the_dictionary_four_times() -> None:
    sae = SparseAutoencoder(Config(d_in=16, expansion_factor=4, architecture="matryoshka"))
    assert sae.matryoshka_widths == (4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 5), r"found shape \(3, 5\), expected \(..., d_in\) with d_in = 8"),
        (torch.zeros(()), r"found shape \(\), expected \(..., d_in\)"),
        (np.zeros((3, 8), dtype=np.float32), "found ndarray, expected a tensor"),
        ([[0.0] * 8], "found list, expected a tensor"),
    ],
)
def test_what_is_no_tensor_of_activations_is_named(given: Any, message: str) -> None:
    sae = SparseAutoencoder(LanguageModelSAERunnerConfig(d_in=8, expansion_factor=2))
    for function in (sae.encode, sae.forward):
        with pytest.raises((ValueError, TypeError), match=message):
            function(given)


def test_latents_of_another_number_are_named() -> None:
    sae = SparseAutoencoder(LanguageModelSAERunnerConfig(d_in=8, expansion_factor=2))
    with pytest.raises(ValueError, match=r"found shape \(3, 9\), expected \(..., d_sae\) with d_sae = 16"):
        sae.decode(torch.zeros(3, 9))
