"""The losses that revive dead latents, by having them predict the error of the live ones: ghost gradients and AuxK."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_training.machine.precision import at_least_float32
from sae_training.sparse_autoencoder.losses import Reconstruction, Whole, centred_norm, normalised_squared_error, wide

AUXK_ROWS_SHARE, AUXK_MIN_ROWS = 32, 128

"""AuxK looks at one row in 32 (at least 128 rows, or all): a random sample, since rows are shuffled.

Its loss is a mean over rows, so the expected gradient is that of all rows; with k_aux = d_in / 2 it would otherwise
have several times the entries of the step itself. Latents dead after 500k rows of SmolLM2, batch 2048, for two seeds:
30 and 26 with 256 rows, 33 and 29 with 128, 31 and 20 with 64; explained variance 0.9228 in all.
"""


def n_auxk_rows(n_rows: int) -> int:
    return min(n_rows, max(AUXK_MIN_ROWS, n_rows // AUXK_ROWS_SHARE))


def n_own_auxk_rows(whole: Whole) -> int:
    """The number of AuxK's rows that are computed here: the first of the rows here."""
    return whole.share.count(n_auxk_rows(whole.n_rows))


def remedy_loss(
    made: Reconstruction, whole: Whole, auxk_coefficient: float, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
) -> Tensor:
    """AuxK's loss times its coefficient if `made` has AuxK's prediction, else that of ghost gradients, a scalar.

    It is 0 if no latent is to be revived. Where several processes share the rows, their mean by `whole.weight` is the
    loss of all rows.
    """
    sae_in, sae_out, dead = made.sae_in.to(W_enc.dtype), made.sae_outs[-1], made.dead
    target = whole.target
    if dead is None:
        return torch.zeros((), dtype=target.dtype, device=target.device)
    if made.error_hat is not None:
        n = len(made.error_hat)
        few = Whole(target[:n], whole.share, whole.shard, n_auxk_rows(whole.n_rows))
        loss = auxk_loss(few, (target[:n] - sae_out[:n]).detach(), made.error_hat) * (few.weight / whole.weight)
        return auxk_coefficient * loss * whole.shard.any(dead.any())
    if dead.device.type == "cpu":
        dead_pre, W_dec = sae_in @ W_enc[:, dead] + b_enc[dead], W_dec[dead]
    else:  # picking the dead ones would wait for the device
        all_pre = made.pre.values if made.pre.entries is None else sae_in @ W_enc + b_enc
        dead_pre = all_pre.masked_fill(~dead, -torch.inf)
    return ghost_grad_loss(whole, sae_out, dead_pre, W_dec) * whole.shard.any(dead.any())


def ghost_grad_loss(whole: Whole, sae_out: Tensor, dead_pre: Tensor, W_dec: Tensor) -> Tensor:
    """Ghost gradients: lets dead latents predict the residual through exp() of their pre-activations.

    `sae_out` (rows, d) are the reconstructions of x, the own rows of `whole`, `dead_pre` (rows, n) the pre-activations
    of the dead latents (-inf for others among them), `W_dec` (n, d) their decoder rows. In five steps, r being the
    residual x - sae_out:
      1. the norm of r in each row;
      2. g = exp(dead_pre) W_dec, scaled (without gradient) to half the norm of r;
      3. the squared error of g against r, over the row's centred norm of r;
      4. rescaled element by element, without gradient, so that the value is that of the MSE loss and only the
         gradient matters;
      5. the mean.
    The gradient reaches the dead columns of W_enc and b_enc, the dead rows of W_dec, and b_dec through the encoder's
    input. Source: Jermyn & Templeton, Ghost Grads, Transformer Circuits, January 2024.
    """
    x, norm = whole.target, whole.centred_norm()
    exact = at_least_float32(x.dtype)
    residual = (x - sae_out).detach().to(exact)
    dead_pre = dead_pre.to(exact)
    # exp() overflows above 88 in float32. A factor common to a row drops out of step 2, so large rows are shifted down;
    # the 1e-6 shrinks with them, which keeps the value exactly that of the unshifted formula.
    shift = whole.shard.greatest(F.pad(dead_pre.detach(), (0, 1)).amax(dim=-1, keepdim=True))  # at least 0
    ghost = whole.shard.added((dead_pre - shift).exp() @ W_dec.to(exact))
    ghost_norm = ghost.detach().norm(dim=-1, keepdim=True)
    scale = residual.norm(dim=-1, keepdim=True) / (1e-6 * (-shift).exp() + 2 * ghost_norm)
    residual_norm = centred_norm(residual, whole.mean_row(residual))
    error = normalised_squared_error(ghost * scale.nan_to_num(0, posinf=0), residual, residual_norm)
    mse = normalised_squared_error(sae_out.detach(), x, norm).to(exact)
    rescale = mse / (error.detach() + 1e-6)
    return (rescale * error).mean().to(x.dtype)


def auxk_loss(whole: Whole, error: Tensor, error_hat: Tensor) -> Tensor:
    """AuxK: how badly `error_hat`, made by dead latents, predicts the `error` of own rows of `whole`, all (rows, d).

    mean (e_hat - e)^2 / mean (e - mean_rows(e))^2, which is 1 for predicting the mean error (Gao et al. 2024, arXiv
    2406.04093, appendix A.2); e must carry no gradient. That ratio is brought to the unit of the MSE loss by the MSE
    loss of predicting the mean row, so that a coefficient of 1/32 means what it means in the paper.
    """
    x = whole.target
    exact = at_least_float32(x.dtype)
    error, error_hat = error.to(exact), error_hat.to(exact)
    variance = whole.mean((error - whole.mean_row(error)).pow(2).mean())
    # Without variance (one row, or equal rows) there is nothing to predict: the loss and its gradient are 0. A ratio
    # by 0 whose value alone is mended would still have a gradient of NaN.
    weight = torch.where(variance > 0, 1 / torch.where(variance > 0, variance, 1.0), 0.0)
    mean_row = whole.mean_row(x)
    norm = centred_norm(wide(x), whole.mean_row(wide(x)))
    unit = whole.mean(normalised_squared_error(mean_row, x, norm).to(exact).mean())
    return ((error_hat - error).pow(2).mean() * weight * unit).to(x.dtype)
