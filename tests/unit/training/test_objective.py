"""Each architecture's losses and gradients against formulas written out plainly, by the dense way and by the sparse."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.kernels.selection import Encoder
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Coefficients, Losses
from sae_training.training import objective as objective_module
from sae_training.training.objective import objective
from sae_training.training.trainer import track_inference_threshold

D_IN, D_SAE, ROWS, K = 6, 24, 40, 3
BANDWIDTH, L1 = 0.2, 0.03

CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard lp": {"architecture": "standard", "lp_norm": 0.5},
    "standard decoder norm": {"architecture": "standard", "scale_sparsity_penalty_by_decoder_norm": True},
    "topk": {},
    "topk multi": {"architecture": "topk", "multi_topk": True},
    "batchtopk": {},
    "matryoshka": {"matryoshka_widths": (4, 10)},
    "matryoshka topk": {"architecture": "matryoshka", "matryoshka_widths": (4, 10), "matryoshka_selection": "topk"},
    "jumprelu": {},
    "jumprelu target": {"architecture": "jumprelu", "target_l0": 2.0},
    "jumprelu tanh": {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "tanh"},
    "jumprelu decoder norm": {"architecture": "jumprelu", "scale_sparsity_penalty_by_decoder_norm": True}
    | {"jumprelu_sparsity_loss_mode": "tanh"},
    "gated": {},
}
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {},
    "auxk": {"auxk_coefficient": 0.5, "auxk_k": 2},
    "ghost": {"use_ghost_grads": True},
}
DEAD = torch.arange(D_SAE) % 5 == 0


def make(case: str, **changes: Any) -> SparseAutoencoder:
    """An autoencoder in float64 whose weights are away from their start, and whose codes are sparse."""
    options: dict[str, Any] = {"architecture": case.split()[0], **CASES[case], **changes}
    if options["architecture"] == "jumprelu":
        options["jumprelu_bandwidth"] = BANDWIDTH
    cfg = LanguageModelSAERunnerConfig(
        d_in=D_IN,
        expansion_factor=D_SAE // D_IN,
        k=K,
        dtype="float64",  # pyright: ignore[reportArgumentType]
        l1_coefficient=L1,
        train_batch_size=ROWS,
        **options,
    )
    sae = SparseAutoencoder(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.sub_(3.0)  # few positive pre-activations, so that the sparse way is not refused
        if hasattr(sae, "log_threshold"):
            sae.log_threshold.add_(1.0)
    return sae


def batch() -> Tensor:
    return 2 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3


def run(sae: SparseAutoencoder, dead: Tensor | None, sparse: bool) -> tuple[Losses, dict[str, Tensor]]:
    sae.zero_grad(set_to_none=True)
    x = batch()
    losses = (objective if sparse else SparseAutoencoder.losses)(sae, x, x, Coefficients(L1, K), dead)
    losses.loss.backward()
    return losses, gradients(sae)


def gradients(sae: SparseAutoencoder) -> dict[str, Tensor]:
    zeros = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
    return zeros | {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("case", CASES)
def test_the_sparse_way_equals_the_dense_way(case: str, remedy: str) -> None:
    sae = make(case, **REMEDIES[remedy])
    dead = None if remedy == "none" else DEAD
    dense, dense_gradients = run(sae, dead, sparse=False)
    sparse, sparse_gradients = run(sae, dead, sparse=True)
    assert dense.code.entries is None
    assert sparse.code.entries is not None, "the sparse way was not taken"
    torch.testing.assert_close(sparse.sae_out, dense.sae_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sparse.feature_acts, dense.feature_acts, rtol=1e-10, atol=1e-12)
    for name in ("loss", "mse_loss", "l1_loss", "ghost_grad_loss"):
        torch.testing.assert_close(getattr(sparse, name), getattr(dense, name), rtol=1e-10, atol=1e-12)
    for name, gradient in dense_gradients.items():
        torch.testing.assert_close(sparse_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert (dense.ghost_grad_loss > 0) == (remedy != "none")


# ------------------------------------------------------------------------------------------- formulas, written plainly


def normalised_mse(out: Tensor, x: Tensor) -> Tensor:
    return ((out - x).pow(2) / (x - x.mean(0)).norm(dim=1, keepdim=True)).mean()


def largest_mask(pre: Tensor, n: int) -> Tensor:
    return pre >= pre.sort(descending=True).values[..., n - 1 : n]


def reference(sae: SparseAutoencoder, case: str, x: Tensor) -> Tensor:
    """The loss of the case, by its paper's formula, with every straight-through term as a surrogate of equal value."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    decode = lambda acts: acts @ sae.W_dec + sae.b_dec  # noqa: E731
    l1 = lambda acts: L1 * acts.sum(dim=1).mean()  # noqa: E731
    match case:
        case "standard":
            return normalised_mse(decode(pre.relu()), x) + l1(pre.relu())
        case "standard lp":
            roots = torch.where(pre > 0, pre.clamp_min(1e-12).sqrt(), 0.0)
            return normalised_mse(decode(pre.relu()), x) + l1(roots)
        case "standard decoder norm":
            return normalised_mse(decode(pre.relu()), x) + l1(pre.relu() * sae.W_dec.norm(dim=1))
        case "topk":
            return normalised_mse(decode(pre.relu() * largest_mask(pre, K)), x)
        case "topk multi":
            small, large = (decode(pre.relu() * largest_mask(pre, n)) for n in (K, 4 * K))
            return normalised_mse(small, x) + normalised_mse(large, x) / 8
        case "batchtopk":
            return normalised_mse(decode(pre.relu() * largest_mask(pre.relu().flatten(), K * ROWS).view_as(pre)), x)
        case "matryoshka" | "matryoshka topk":
            flat = pre.relu() if case.endswith("topk") else pre.relu().flatten()
            acts = pre.relu() * largest_mask(flat, K if case.endswith("topk") else K * ROWS).view_as(pre)
            prefixes = (acts * (torch.arange(D_SAE) < width) for width in (4, 10, D_SAE))
            return sum(normalised_mse(decode(prefix), x) for prefix in prefixes) / 3  # pyright: ignore
        case "gated":
            magnitude = (sae.r_mag.exp() * ((x - sae.b_dec) @ sae.W_enc) + sae.b_mag).relu()
            frozen = pre.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
            recon = normalised_mse(decode((pre > 0) * magnitude), x)
            return recon + l1(pre.relu()) + normalised_mse(frozen, x)
        case _:
            return jumprelu_reference(sae, case, x, pre)


def jumprelu_reference(sae: SparseAutoencoder, case: str, x: Tensor, pre: Tensor) -> Tensor:
    threshold = sae.log_threshold.exp()
    kernel = ((pre - threshold).abs() < BANDWIDTH / 2).double()
    # (threshold - its value) is 0, and brings in the pseudo-derivatives of the paper.
    nudge = threshold - threshold.detach()
    acts = pre * (pre > threshold) - (threshold / BANDWIDTH * kernel).detach() * nudge
    steps = (pre > threshold).double() - kernel / BANDWIDTH * nudge
    recon = normalised_mse(acts @ sae.W_dec + sae.b_dec, x)
    l0 = steps.sum(dim=1).mean()
    match case:
        case "jumprelu":
            return recon + L1 * l0
        case "jumprelu target":
            return recon + L1 * (l0 / 2.0 - 1) ** 2
        case "jumprelu tanh":
            return recon + L1 * (4 * acts).tanh().sum(dim=1).mean()
        case _:
            return recon + L1 * (4 * acts * sae.W_dec.norm(dim=1)).tanh().sum(dim=1).mean()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(case: str, sparse: bool) -> None:
    sae = make(case)
    losses, found = run(sae, None, sparse)
    sae.zero_grad(set_to_none=True)
    expected = reference(sae, case, batch())
    expected.backward()
    torch.testing.assert_close(losses.loss, expected, rtol=1e-10, atol=1e-12)
    for name, gradient in gradients(sae).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", ["standard", "jumprelu", "gated"])
def test_a_dense_code_goes_the_dense_way(case: str) -> None:
    sae = make(case)
    with torch.no_grad():
        sae.b_enc.add_(4.0)
    losses, _ = run(sae, None, sparse=True)
    assert losses.code.entries is None


@pytest.mark.parametrize("case", ["topk", "batchtopk", "matryoshka"])
def test_auxk_gives_live_latents_no_gradient(case: str) -> None:
    sae = make(case, **REMEDIES["auxk"])
    x = batch()
    objective(sae, x, x, Coefficients(L1, K), DEAD).ghost_grad_loss.backward()
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None
    assert not sae.W_enc.grad[:, ~DEAD].any()
    assert not sae.W_dec.grad[~DEAD].any()
    assert sae.W_enc.grad[:, DEAD].any()


def test_batchtopk_keeps_k_a_row_on_average_and_may_give_rows_more() -> None:
    sae = make("batchtopk")
    with torch.no_grad():
        sae.b_enc.add_(3.0)
    losses, _ = run(sae, None, sparse=True)
    per_row = (losses.feature_acts > 0).sum(dim=1)
    assert per_row.sum() == K * ROWS
    assert per_row.max() > K


@pytest.mark.parametrize("case", ["batchtopk", "topk", "standard"])
def test_tiles_of_latents_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make(case)
    whole, whole_gradients = run(sae, None, sparse=True)
    monkeypatch.setattr(objective_module, "Encoder", partial(Encoder, tile_latents=7, tile_rows=11))
    tiled, tiled_gradients = run(sae, None, sparse=True)
    assert tiled.code.entries is not None
    torch.testing.assert_close(tiled.feature_acts, whole.feature_acts)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(tiled_gradients[name], gradient, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_code_without_any_active_latent_is_trained_on(case: str) -> None:
    sae = make(case)
    with torch.no_grad():
        sae.b_enc.sub_(1000.0)
    losses, found = run(sae, None, sparse=True)
    assert not losses.feature_acts.any()
    torch.testing.assert_close(losses.sae_out, sae.b_dec.detach().expand(ROWS, D_IN))
    assert all(gradient.isfinite().all() for gradient in found.values())
    track_inference_threshold(sae, losses.code, 0)
    assert all(weight.isfinite().all() for _, weight in sae.weights())
