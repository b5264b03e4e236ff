"""The loss terms of a sparse autoencoder, as pure functions of (rows, width) tensors.

The unit of all of them is that of the reconstruction loss: the squared error of each element over the L2 norm of the
row's centred input, averaged over elements. The loss therefore grows linearly with the scale of the activations, and
rows of large norm count in proportion to their norm, not to its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_training.kernels.sparse_code import Code, CodeFigures


def centred_norm(x: Tensor) -> Tensor:
    """L2 norm of each row of `x` (rows, d) after subtracting the mean row, as (rows, 1).

    A row that equals the mean row (always so in a batch of one) has no centred norm: its own norm stands in, or 1.
    """
    centred = (x - x.mean(dim=0, keepdim=True)).norm(dim=-1, keepdim=True)
    own = x.norm(dim=-1, keepdim=True)
    scale = torch.where(centred > 1e-6 * own, centred, own)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def normalised_squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Elementwise (x_hat - x)^2 / ||x - mean_batch(x)||_2, shape (rows, d); its mean is the MSE loss.

    In float32 at least: in float16 the square of an error of 256 is infinite, which divided by the norm it is not.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    return ((x_hat.to(wide) - x.to(wide)).pow(2) / centred_norm(x.to(wide))).to(dtype)


class MeanNormalisedError(Function):
    """`mean_normalised_error`, its gradient written out: three passes over (rows, d), where autograd has eight."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor, norm: Tensor) -> Any:
        wide = torch.promote_types(x.dtype, torch.float32)
        error = x_hat.to(wide) - x.to(wide)
        weight = 1 / (norm.to(wide) * error.numel())
        ctx.save_for_backward(error, weight)
        ctx.dtype = x_hat.dtype
        return (torch.linalg.vector_norm(error, dim=-1, keepdim=True).square() * weight).sum().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        error, weight = ctx.saved_tensors
        return (error * (2 * gradients[0].to(error.dtype) * weight)).to(ctx.dtype), None, None


def mean_normalised_error(x_hat: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """The mean of `normalised_squared_error`, given `norm` = `centred_norm(x)` (rows, 1): the MSE loss.

    `x_hat` may be several reconstructions of x, (..., rows, d): their mean. The gradient reaches it alone.
    """
    return MeanNormalisedError.apply(x_hat, x, norm)  # pyright: ignore[reportReturnType]


def ghost_grad_loss(x: Tensor, sae_out: Tensor, dead_pre: Tensor, W_dec: Tensor) -> Tensor:
    """Ghost gradients: lets dead latents predict the residual through exp() of their pre-activations.

    `dead_pre` (rows, n) are the pre-activations of the dead latents (-inf for others among them), `W_dec` (n, d) their
    decoder rows. In five steps, r being the residual x - sae_out:
      1. the norm of r in each row;
      2. g = exp(dead_pre) W_dec, scaled (without gradient) to half the norm of r;
      3. the squared error of g against r, over the row's centred norm of r;
      4. rescaled element by element, without gradient, to the size of the MSE loss, so that only its gradient speaks;
      5. the mean.
    The gradient reaches the dead columns of W_enc and b_enc, the dead rows of W_dec, and b_dec through the encoder's
    input. Source: Jermyn & Templeton, Ghost Grads, Transformer Circuits, January 2024.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    residual = (x - sae_out).detach().to(wide)
    dead_pre = dead_pre.to(wide)
    # exp() overflows above 88 in float32. A factor common to a row drops out of step 2, so large rows are shifted down;
    # the 1e-6 shrinks with them, which keeps the value exactly that of the unshifted formula.
    shift = dead_pre.detach().amax(dim=-1, keepdim=True).clamp_min(0)
    ghost = (dead_pre - shift).exp() @ W_dec.to(wide)
    ghost_norm = ghost.detach().norm(dim=-1, keepdim=True)
    scale = residual.norm(dim=-1, keepdim=True) / (1e-6 * (-shift).exp() + 2 * ghost_norm)
    error = normalised_squared_error(ghost * scale.nan_to_num(0, posinf=0), residual)
    mse = normalised_squared_error(sae_out.detach(), x).to(wide)
    rescale = mse / (error.detach() + 1e-6)
    return (rescale * error).mean().to(x.dtype)


def auxk_loss(x: Tensor, error: Tensor, error_hat: Tensor) -> Tensor:
    """AuxK: how badly `error_hat`, made by dead latents, predicts the `error` of reconstructing `x`, all (rows, d).

    mean (e_hat - e)^2 / mean (e - mean_rows(e))^2, which is 1 for predicting the mean error (Gao et al. 2024, arXiv
    2406.04093, appendix A.2); e must carry no gradient. That ratio is brought to the unit of the MSE loss by the MSE
    loss of predicting the mean row, so that a coefficient of 1/32 means what it means in the paper.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    error, error_hat = error.to(wide), error_hat.to(wide)
    variance = (error - error.mean(dim=0)).pow(2).mean()
    # Without variance (one row, or equal rows) there is nothing to predict: the loss and its gradient are 0. A ratio
    # by 0 whose value alone is mended would still have a gradient of NaN.
    weight = torch.where(variance > 0, 1 / torch.where(variance > 0, variance, 1.0), 0.0)
    unit = normalised_squared_error(x.mean(dim=0, keepdim=True), x).to(wide).mean()
    return ((error_hat - error).pow(2).mean() * weight * unit).to(x.dtype)


AUXK_ROWS_SHARE, AUXK_MIN_ROWS = 32, 128

"""AuxK looks at one row in 32 (at least 128 rows, or all): a random sample, since rows are shuffled.

Its loss is a mean over rows, so the expected gradient is that of all rows; with k_aux = d_in / 2 it would otherwise
have several times the entries of the step itself. Latents dead after 500k rows of SmolLM2, batch 2048, for two seeds:
30 and 26 with 256 rows, 33 and 29 with 128, 31 and 20 with 64; explained variance 0.9228 in all.
"""

MULTI_TOPK_FACTOR, MULTI_TOPK_WEIGHT = 4, 1 / 8


@dataclass(frozen=True)
class Coefficients:
    """What schedules set anew in each step."""

    l1_coefficient: float
    k: int


@dataclass(frozen=True)
class Losses:
    """Losses of a batch; `loss` is the sum of the three others. See `sparse_autoencoder.ForwardOutput`."""

    sae_out: Tensor
    code: Code | CodeFigures
    """Figures alone, where the batch went through in parts."""
    loss: Tensor
    mse_loss: Tensor
    l1_loss: Tensor
    ghost_grad_loss: Tensor

    @property
    def feature_acts(self) -> Tensor:
        """Latent activations as (rows, d_sae)."""
        assert isinstance(self.code, Code), "the codes of a batch in parts are not kept"
        return self.code.dense()

    def detach(self) -> Losses:
        code = self.code.detach() if isinstance(self.code, Code) else self.code
        return Losses(self.sae_out.detach(), code, *(t.detach() for t in self.scalars()))

    def scalars(self) -> tuple[Tensor, ...]:
        return self.loss, self.mse_loss, self.l1_loss, self.ghost_grad_loss


@dataclass(frozen=True)
class Reconstruction:
    """What the encoder and decoder make of a batch of `rows` rows; all but `sae_outs` may be missing."""

    pre: Code
    """Pre-activations, dense or at the active entries."""
    acts: Code
    sae_outs: Tensor
    """(prefixes, rows, d_out): one reconstruction, or one for each nested dictionary, the whole last."""
    multi_out: Tensor | None = None
    """From MULTI_TOPK_FACTOR * k latents, (rows, d_out)."""
    gate_out: Tensor | None = None
    """From the gate's ReLU through the frozen decoder, (rows, d_out)."""
    error_hat: Tensor | None = None
    """What AuxK's dead latents predict of the error, (auxk_rows, d_out)."""


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def n_auxk_rows(n_rows: int) -> int:
    return min(n_rows, max(AUXK_MIN_ROWS, n_rows // AUXK_ROWS_SHARE))


def add_up(made: Reconstruction, target: Tensor, norm: Tensor | None, penalty: Tensor, remedy: Tensor) -> Losses:
    """The losses of a batch: the MSE loss of every reconstruction in `made`, the penalty and the remedy's loss.

    `norm` (rows, 1): the rows' share of `centred_norm` of the batch that they are a part of; None: they are all of it.
    """
    norm = centred_norm(wide(target)) if norm is None else norm
    mse_loss = mean_normalised_error(made.sae_outs, target, norm)
    if made.multi_out is not None:
        mse_loss = mse_loss + MULTI_TOPK_WEIGHT * mean_normalised_error(made.multi_out, target, norm)
    if made.gate_out is not None:
        mse_loss = mse_loss + mean_normalised_error(made.gate_out, target, norm)
    return Losses(made.sae_outs[-1], made.acts, mse_loss + penalty + remedy, mse_loss, penalty, remedy)
