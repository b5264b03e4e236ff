from __future__ import annotations

import math

import pytest
import torch

from sae_training.sparse_autoencoder.dead_latent_losses import auxk_loss, ghost_grad_loss
from sae_training.sparse_autoencoder.losses import Whole, centred_norm, mean_normalised_error, normalised_squared_error


def test_normalised_squared_error_by_hand() -> None:
    # Rows (0, 0) and (2, 4) have the mean (1, 2); each is sqrt(1 + 4) from it.
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 9.0]]) / math.sqrt(5)
    torch.testing.assert_close(normalised_squared_error(x_hat, x), expected)


def test_normalised_squared_error_grows_linearly_with_scale() -> None:
    x, x_hat = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    once, tenfold = normalised_squared_error(x_hat, x), normalised_squared_error(10 * x_hat, 10 * x)
    torch.testing.assert_close(tenfold, 10 * once)


def test_centred_norm_of_a_batch_of_one_is_the_norm_of_its_row() -> None:
    assert centred_norm(torch.tensor([[3.0, 4.0]])).tolist() == [[5.0]]


def test_centred_norm_of_zeros_is_one() -> None:
    assert centred_norm(torch.zeros(2, 3)).tolist() == [[1.0], [1.0]]


def test_mean_normalised_error_is_the_mean_of_the_elements() -> None:
    x, x_hat = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = normalised_squared_error(x_hat, x).mean()
    torch.testing.assert_close(mean_normalised_error(x_hat, x, centred_norm(x)), expected)


def ghost_case(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    sae_out = x + 0.3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    hidden_pre = scale * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    W_dec = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    case = {"x": x, "sae_out": sae_out, "hidden_pre": hidden_pre, "W_dec": W_dec}
    return {name: tensor.to(dtype).requires_grad_(name in ("hidden_pre", "W_dec")) for name, tensor in case.items()}


DEAD = torch.tensor([True, False, False, True, False])


def ghost(case: dict[str, torch.Tensor], masked: bool = False) -> torch.Tensor:
    """The loss from the dead latents picked out, or (`masked`) from all of them with the live ones at -inf."""
    dead_pre, W_dec = case["hidden_pre"][:, DEAD], case["W_dec"][DEAD]
    if masked:
        dead_pre, W_dec = case["hidden_pre"].masked_fill(~DEAD, -torch.inf), case["W_dec"]
    return ghost_grad_loss(Whole(case["x"]), case["sae_out"], dead_pre, W_dec)


def test_ghost_grad_loss_has_the_value_of_the_mse_loss() -> None:
    case = ghost_case()
    mse = normalised_squared_error(case["sae_out"], case["x"])
    loss = ghost(case)
    # Step 4 rescales each element to the MSE's; the 1e-6 in the denominator makes it a little smaller.
    torch.testing.assert_close(loss, mse.mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_ghost_grad_gradient_follows_the_five_steps(masked: bool) -> None:
    case = ghost_case()
    mse = normalised_squared_error(case["sae_out"], case["x"])
    ghost(case, masked).backward()
    pre, W = case["hidden_pre"].detach(), case["W_dec"].detach()

    # The same steps element by element, with the derivative written out: d loss / d g_ij = rescale_ij * 2 (g_ij - r_ij)
    # / ||r_i - mean r|| / n, g = scale_i * sum_l exp(pre_il) W_lj over dead l, scale without gradient.
    residual = case["x"] - case["sae_out"]
    centred = (residual - residual.mean(dim=0)).norm(dim=1)
    expected_pre, expected_W = torch.zeros_like(pre), torch.zeros_like(W)
    for i in range(6):
        raw = sum(pre[i, latent].exp() * W[latent] for latent in (0, 3))
        scale = residual[i].norm() / (1e-6 + 2 * raw.norm())
        error = (scale * raw - residual[i]) ** 2 / centred[i]
        rescale = mse[i] / (error + 1e-6)
        d_g = rescale * 2 * (scale * raw - residual[i]) / centred[i] / 24
        for latent in (0, 3):
            expected_pre[i, latent] = scale * pre[i, latent].exp() * (d_g @ W[latent])
            expected_W[latent] += scale * pre[i, latent].exp() * d_g
    torch.testing.assert_close(case["hidden_pre"].grad, expected_pre, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(case["W_dec"].grad, expected_W, rtol=1e-4, atol=1e-7)


def test_ghost_grad_gives_live_latents_exactly_no_gradient() -> None:
    case = ghost_case()
    ghost(case).backward()
    assert not case["hidden_pre"].grad[:, ~DEAD].any()
    assert not case["W_dec"].grad[~DEAD].any()
    assert case["hidden_pre"].grad[:, DEAD].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 200.0, -200.0])
def test_ghost_grad_is_finite_for_any_pre_activation(dtype: torch.dtype, scale: float) -> None:
    case = ghost_case(dtype, scale)
    loss = ghost(case)
    loss.backward()
    assert loss.isfinite()
    assert case["hidden_pre"].grad.isfinite().all()
    assert case["W_dec"].grad.isfinite().all()


def auxk_case() -> dict[str, torch.Tensor]:
    return {
        "x": torch.tensor([[2.0, 0.0], [0.0, 0.0]]),
        "sae_out": torch.tensor([[0.0, 0.0], [0.0, 0.0]]),
        "hidden_pre": torch.tensor([[1.0, 9.0, 0.5], [-1.0, 9.0, 0.2]], requires_grad=True),
        "W_dec": torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]], requires_grad=True),
    }


AUXK_DEAD = torch.tensor([True, False, True])


def auxk(case: dict[str, torch.Tensor]) -> torch.Tensor:
    """AuxK with the most active of the dead latents 0 and 2 on each row."""
    dead_pre = case["hidden_pre"].masked_fill(~AUXK_DEAD, -torch.inf)
    chosen = dead_pre == dead_pre.max(dim=1, keepdim=True).values
    return auxk_loss(Whole(case["x"]), case["x"] - case["sae_out"], (dead_pre.relu() * chosen) @ case["W_dec"])


def test_auxk_loss_by_hand() -> None:
    # Top 1 of the dead latents 0 and 2: row 0 takes latent 0 at 1, row 1 takes latent 2 at 0.2. e_hat is (1, 0) and
    # (0, 0.2), e is (2, 0) and (0, 0): squared errors 1 and 0.04, mean 1.04 / 4. e - mean e is (1, 0) and (-1, 0):
    # mean of squares 2 / 4. The mean row of x is (1, 0), at distance 1 from each row: unit (1 + 1) / 1 / 4.
    loss = auxk(auxk_case())
    assert loss.item() == pytest.approx((1.04 / 4) / (2 / 4) * (2 / 4))


def test_auxk_gradient_reaches_the_encoder_of_chosen_dead_latents_only() -> None:
    case = auxk_case()
    auxk(case).backward()
    reached = case["hidden_pre"].grad != 0
    assert reached.tolist() == [[True, False, False], [False, False, True]]
    assert (case["W_dec"].grad != 0).any(dim=1).tolist() == [True, False, True]


def test_auxk_of_one_row_has_no_loss_and_a_gradient_of_zero() -> None:
    # One row's error has no variance around the mean error, so there is nothing to predict.
    case = {name: tensor[:1] if name != "W_dec" else tensor for name, tensor in auxk_case().items()}
    pre = case["hidden_pre"].detach().requires_grad_()
    loss = auxk(case | {"hidden_pre": pre})
    loss.backward()
    assert loss.item() == 0
    assert not pre.grad.any()


def test_squared_error_of_large_activations_is_finite_in_float16() -> None:
    # An error of 3000 squares to 9e6, above float16's 65,504; over the norm it is about 3000.
    x = torch.zeros(2, 4, dtype=torch.float16)
    x[0, 0] = 6000
    error = normalised_squared_error(x / 2, x)
    assert error.dtype == torch.float16
    assert error[0, 0].item() == pytest.approx(3000**2 / 3000, rel=1e-3)


def test_auxk_with_a_perfect_reconstruction_is_zero() -> None:
    case = auxk_case()
    case["sae_out"] = case["x"]
    assert auxk(case).item() == 0
