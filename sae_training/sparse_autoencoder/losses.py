"""The reconstruction loss of a sparse autoencoder, and the values that the losses are computed from and returned in.

The unit of all losses is that of the reconstruction loss: the squared error of each element over the L2 norm of the
row's centred input, averaged over elements. The loss therefore grows linearly with the scale of the activations, and
rows of large norm count in proportion to their norm, not to its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sae_training.kernels.sparse_code import Code, CodeFigures
from sae_training.machine.precision import at_least_float32
from sae_training.parallel.block import Block
from sae_training.parallel.shard import WHOLE, Shard
from sae_training.parallel.share import ALONE, Share

MULTI_TOPK_FACTOR, MULTI_TOPK_WEIGHT = 4, 1 / 8


@dataclass(frozen=True)
class Coefficients:
    """The numbers in the losses that schedules change from step to step."""

    l1_coefficient: float
    k: int


@dataclass(frozen=True)
class Whole:
    """The rows that the losses are over, of which some, and some of the latents, are here: in one process all."""

    target: Tensor
    """What the reconstructions of the rows here should be, (rows, d_out)."""
    share: Share = ALONE
    shard: Shard = WHOLE
    n_of_all: int | None = None
    """The number of all rows; None: they are here."""

    @property
    def block(self) -> Block:
        """The part of the code that is here."""
        return Block(self.share, self.shard)

    @property
    def n_rows(self) -> int:
        return len(self.target) if self.n_of_all is None else self.n_of_all

    @property
    def weight(self) -> float:
        """The part of the rows that are computed here."""
        return self.share.weight(self.n_rows)

    def mean(self, of_own: Tensor) -> Tensor:
        """Return the mean over all rows from that over the own rows, without gradient."""
        return self.share.mean(of_own, self.n_rows)

    def mean_row(self, rows: Tensor) -> Tensor:
        """Return the mean row (1, d) of all rows from the own ones (n, d)."""
        return self.mean(rows.mean(dim=0, keepdim=True))

    def centred_norm(self) -> Tensor:
        """Return `centred_norm` (rows, 1) of the targets here, around the mean row of all."""
        target = wide(self.target)
        return centred_norm(target, self.mean_row(target))


@dataclass(frozen=True)
class Reconstruction:
    """All that the losses of a batch are computed from. Fields that default to None are for some architectures only."""

    sae_in: Tensor
    """Input of the encoder, (rows, d_in)."""
    pre: Code
    """Pre-activations, of all latents or at the active entries."""
    acts: Code
    """Activations, in the same form."""
    sae_outs: Tensor
    """(prefixes, rows, d_out): one reconstruction, or one for each nested dictionary, the whole one last."""
    dead: Tensor | None
    """Mask (d_sae,) of the latents to revive; None: there are none."""
    multi_out: Tensor | None = None
    """Reconstruction from MULTI_TOPK_FACTOR * k latents, (rows, d_out)."""
    gate_out: Tensor | None = None
    """Reconstruction from the gate's ReLU, through a decoder without gradient, (rows, d_out)."""
    error_hat: Tensor | None = None
    """AuxK's prediction of the error, from dead latents, (auxk_rows, d_out)."""


@dataclass(frozen=True)
class Losses:
    """Losses of a batch; `loss` is the sum of the three others. See `ForwardOutput`."""

    sae_out: Tensor
    code: Code | CodeFigures
    """The latent activations; only figures of them where the batch was computed in parts."""
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

    def scalars(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.loss, self.mse_loss, self.l1_loss, self.ghost_grad_loss


class ForwardOutput(NamedTuple):
    """What `SparseAutoencoder.forward` returns; unpacks in this order."""

    sae_out: Tensor
    """Reconstruction (..., d_out)."""
    feature_acts: Tensor
    """Latent activations, (..., d_sae)."""
    loss: Tensor
    """mse_loss + l1_loss + ghost_grad_loss, a scalar."""
    mse_loss: Tensor
    """Mean over elements of the squared error over the row's centred norm.

    matryoshka: the mean over its nested dictionaries. gated and multi_topk: plus that of their second reconstruction.
    """
    l1_loss: Tensor
    """The architecture's sparsity penalty times l1_coefficient; 0 for topk, batchtopk and matryoshka."""
    ghost_grad_loss: Tensor
    """The loss of the remedy for dead latents: that of ghost gradients, or AuxK's times its coefficient; else 0."""


# ------------------------------------------------------------------------------------------------ reconstruction loss


def reconstruction_loss(made: Reconstruction, whole: Whole, norm: Tensor | None = None) -> Tensor:
    """The MSE loss of all reconstructions in `made`, which are of the rows here of `whole`, a scalar.

    `norm` (rows, 1) is `centred_norm` of these rows in a larger batch, of which `whole` is a part; None: it is all.
    """
    target = whole.target
    norm = whole.centred_norm() if norm is None else norm
    mse_loss = mean_normalised_error(made.sae_outs, target, norm)
    if made.multi_out is not None:
        mse_loss = mse_loss + MULTI_TOPK_WEIGHT * mean_normalised_error(made.multi_out, target, norm)
    if made.gate_out is not None:
        mse_loss = mse_loss + mean_normalised_error(made.gate_out, target, norm)
    return mse_loss


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(at_least_float32(x.dtype))


def centred_norm(x: Tensor, mean_row: Tensor | None = None) -> Tensor:
    """L2 norm of each row of `x` (rows, d) after subtracting the mean row (1, d), as (rows, 1).

    A row that equals the mean row (always so in a batch of one) has no centred norm: its own norm stands in, or 1.
    """
    mean_row = x.mean(dim=0, keepdim=True) if mean_row is None else mean_row
    centred = (x - mean_row).norm(dim=-1, keepdim=True)
    own = x.norm(dim=-1, keepdim=True)
    scale = torch.where(centred > 1e-6 * own, centred, own)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def normalised_squared_error(x_hat: Tensor, x: Tensor, norm: Tensor | None = None) -> Tensor:
    """Elementwise (x_hat - x)^2 / ||x - mean_batch(x)||_2, shape (rows, d); its mean is the MSE loss.

    `norm` (rows, 1) is `centred_norm` of these rows in their batch; None: the rows are the whole batch.

    In float32 at least: in float16 the square of an error of 256 is infinite, which divided by the norm it is not.
    """
    dtype, x = x.dtype, wide(x)
    return ((x_hat.to(x.dtype) - x).pow(2) / (centred_norm(x) if norm is None else norm)).to(dtype)


class MeanNormalisedError(Function):
    """`mean_normalised_error`, its gradient written out: three passes over (rows, d), where autograd has eight."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor, norm: Tensor) -> Any:
        wide = at_least_float32(x.dtype)
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
