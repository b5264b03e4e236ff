"""Transcoders, which predict another hook's activations: losses, steps, start and resampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Coefficients
from sae_training.training.objective import objective
from sae_training.training.resampling import resample
from sae_training.training.trainer import SAETrainer

D_IN, D_OUT, D_SAE, ROWS, K = 6, 5, 24, 40, 3
DEAD = torch.arange(D_SAE) % 5 == 0
HOOKS = {"hook_point": "blocks.1.hook_resid_mid", "target_hook_point": "blocks.1.hook_mlp_out"}


def config(**changes: Any) -> LanguageModelSAERunnerConfig:
    sizes: dict[str, Any] = {"d_in": D_IN, "d_out": D_OUT, "expansion_factor": D_SAE // D_IN, "k": K}
    return LanguageModelSAERunnerConfig(
        **{**HOOKS, **sizes, "dtype": "float64", "architecture": "topk", "train_batch_size": ROWS, **changes}
    )


def make(**changes: Any) -> SparseAutoencoder:
    sae = SparseAutoencoder(config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.sub_(5.0)  # few positive pre-activations, so that the sparse way is not refused
    return sae


def pair(n: int = ROWS) -> tuple[Tensor, Tensor]:
    """Rows and targets, neither around zero."""
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(n, D_IN, generator=generator, dtype=torch.float64) + 0.3
    return x, torch.randn(n, D_OUT, generator=generator, dtype=torch.float64) - 0.7


def gradients(sae: SparseAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(skip: bool, sparse: bool) -> None:
    sae = make(skip_connection=skip)
    x, target = pair()
    losses = (objective if sparse else SparseAutoencoder.losses)(sae, x, target, Coefficients(0.0, K))
    found = gradients(sae, losses.loss)

    pre = x @ sae.W_enc + sae.b_enc
    acts = pre.relu() * (pre >= pre.sort(descending=True).values[:, K - 1 : K])
    out = acts @ sae.W_dec + sae.b_dec
    if skip:
        out = out + x @ sae.W_skip
    loss = ((out - target).pow(2) / (target - target.mean(0)).norm(dim=1, keepdim=True)).mean()
    expected = gradients(sae, loss)

    assert (losses.code.entries is not None) == sparse
    torch.testing.assert_close(losses.loss, loss)
    assert found.keys() == expected.keys() == dict(sae.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("remedy", [{}, {"auxk_coefficient": 0.5, "auxk_k": 2}, {"use_ghost_grads": True}])
@pytest.mark.parametrize(
    "options",
    [{"multi_topk": True}, {"architecture": "batchtopk"}, {"architecture": "matryoshka"}]
    + [{"architecture": name} for name in ("standard", "jumprelu", "gated")],
    ids=str,
)
def test_the_sparse_way_equals_the_dense_way(options: dict, remedy: dict) -> None:
    sae = make(skip_connection=True, **options, **remedy)
    x, target = pair()
    made = [way(sae, x, target, Coefficients(0.03, K), DEAD) for way in (SparseAutoencoder.losses, objective)]
    assert made[1].code.entries is not None
    dense, sparse = ([losses.loss, *gradients(sae, losses.loss).values()] for losses in made)
    for one, other in zip(dense, sparse, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_start_centres_inputs_and_outputs_and_matches_their_sizes() -> None:
    sae = SparseAutoencoder(config(skip_connection=True))
    x, target = pair(500)
    sae.initialize_transcoder(x, target, "mean")
    torch.testing.assert_close(sae.b_dec.detach(), target.mean(0))
    pre = sae.pre_activations(sae.sae_input(x)).detach()
    torch.testing.assert_close(pre.mean(0), torch.zeros(D_SAE, dtype=torch.float64))
    sizes = [(rows - rows.mean(0)).norm(dim=1).mean() for rows in (x, target)]
    columns = sae.W_enc.detach().norm(dim=0)
    torch.testing.assert_close(columns, torch.full((D_SAE,), float(sizes[1] / sizes[0]), dtype=torch.float64))
    assert not sae.W_skip.any()


def test_a_linear_target_is_learned_through_the_skip_connection_alone() -> None:
    matrix = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(5))
    cfg = config(skip_connection=True, dtype="float32", lr=0.05, total_training_tokens=300 * ROWS, lr_warm_up_steps=0)
    sae = SparseAutoencoder(cfg)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # no latent ever fires
    trainer = SAETrainer(sae, cfg)
    generator = torch.Generator().manual_seed(6)
    for step in range(300):
        x = torch.randn(ROWS, D_IN, generator=generator)
        trainer.step(x, step, x @ matrix + 1)
    torch.testing.assert_close(sae.W_skip.detach(), matrix, atol=0.05, rtol=0)
    torch.testing.assert_close(sae.b_dec.detach(), torch.ones(D_OUT), atol=0.05, rtol=0)


@pytest.mark.parametrize("skip", [False, True])
def test_resampled_latents_read_inputs_and_write_targets(skip: bool) -> None:
    cfg = config(architecture="standard", feature_sampling_method="l2", skip_connection=skip, lr=0.05)
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    x, target = pair()
    trainer.step(x, 0, target)
    sae = trainer.sae
    resample(sae, trainer.by_latent(), DEAD, x, target, "l2", torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize
    left_for_latents = target - sae.b_dec.detach() - (x @ sae.W_skip.detach() if skip else 0)
    along = unit(left_for_latents, dim=1) @ sae.W_dec[DEAD].detach().T
    best = along.max(dim=0)
    torch.testing.assert_close(best.values, torch.ones(int(DEAD.sum()), dtype=torch.float64))
    read = unit(sae.W_enc[:, DEAD].detach().T, dim=1)
    torch.testing.assert_close(read, unit(x - x.mean(0), dim=1)[best.indices])
    pre = sae.pre_activations(sae.sae_input(x))[:, DEAD].detach()
    torch.testing.assert_close(pre.mean(0), torch.zeros_like(pre[0]))


def test_low_precision_chooses_the_latents_of_an_uncentred_input() -> None:
    """Rows whose mean is 30 times their deviation, through a transcoder that starts centred."""
    sizes = {"d_in": 64, "d_out": 64, "expansion_factor": 8, "k": 8, "dtype": "float32"}
    sae = SparseAutoencoder(config(**sizes, encoder_matmul_dtype="bfloat16"))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(256, 64, generator=generator) + 30 * torch.randn(64, generator=generator)
    sae.initialize_transcoder(x, torch.randn(256, 64, generator=generator), "mean")
    chosen = objective(sae, x, x, Coefficients(0.0, 8)).feature_acts > 0
    exact = sae.encode(x) > 0
    assert (chosen & exact).sum() / exact.sum() > 0.95


def test_a_transcoder_says_which_input_it_lacks() -> None:
    with pytest.raises(ValueError, match="skip_connection: found True without target_hook_point"):
        LanguageModelSAERunnerConfig(skip_connection=True)
    sae = make(skip_connection=True)
    x, _ = pair()
    with pytest.raises(ValueError, match="target: a transcoder's losses need"):
        sae(x)
    with pytest.raises(ValueError, match="decode needs its input"):
        sae.decode(sae.encode(x))
    with pytest.raises(ValueError, match="target: a transcoder's step needs"):
        SAETrainer(sae, config(skip_connection=True)).step(x, 0)
    with pytest.raises(ValueError, match="d_out: found None"):
        SparseAutoencoder(config(d_out=None))
