"""What the architectures differ in: which latents are active, with what activation, and the penalty on them.

| architecture | active                          | activation             | penalty, weighted by l1_coefficient  |
|--------------|---------------------------------|------------------------|--------------------------------------|
| standard     | pre > 0                         | pre                    | L1, or Lp: sum of activation ** p    |
| topk         | the k largest of a row          | ReLU(pre)              | none                                 |
| batchtopk    | the k * rows largest of a batch | ReLU(pre)              | none                                 |
| matryoshka   | as topk or batchtopk            | ReLU(pre)              | none                                 |
| jumprelu     | pre > threshold of the latent   | pre                    | L0; its distance from a target; tanh |
| gated        | pre > 0 (the gate)              | `gated_activation`     | L1 of ReLU(pre)                      |

Six more are read from files and not trained (`config.types.ONLY_LOADED`):

| architecture     | active                                                    | activation                      |
|------------------|-----------------------------------------------------------|---------------------------------|
| abstopk          | the k of a row with the largest abs(pre)                  | pre, which may be below 0       |
| normtopk         | the k of a row with the largest pre * norm of W_dec's row | ReLU(pre)                       |
| groupmax         | the largest of each of k groups of neighbours             | ReLU(pre)                       |
| linear           | all                                                       | pre, which may be below 0       |
| lineartopk       | the k largest of a row                                    | pre, which may be below 0       |
| matching_pursuit | chosen one after the other, see `matching_pursuit`        | the residual's part along W_dec |

`pre` are pre-activations, (rows, d_sae), or (n,) at the entries of a sparse code. All functions take both forms: a
parameter (d_sae,) is passed as `at(parameter)` (`Code.at`), in a shape that fits. At inference batchtopk uses the
threshold that training measured, so that a row's code does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import WITH_PENALTY
from sae_training.machine.precision import at_least_float32
from sae_training.parallel.block import Block
from sae_training.parallel.shard import WHOLE, Shard
from sae_training.sparse_autoencoder.losses import Reconstruction, Whole


def rectangle(u: Tensor) -> Tensor:
    """The kernel of the straight-through estimators: 1 where |u| < 1/2."""
    return (u.abs() < 0.5).to(u.dtype)


class JumpReLU(Function):
    """pre where pre > threshold, else 0; Rajamanoharan et al. 2024 (arXiv 2407.14435).

    The pseudo-derivative with respect to the threshold is -(threshold / bandwidth) rectangle((pre - threshold) /
    bandwidth); with respect to pre it is that of the function itself.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Any:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        slope = -(threshold / ctx.bandwidth) * rectangle((pre - threshold) / ctx.bandwidth)
        return torch.where(pre > threshold, gradient, 0.0), sum_to(gradient * slope, threshold), None


class Step(Function):
    """1 where pre > threshold, else 0; summed, the L0 norm (same source).

    The pseudo-derivative with respect to the threshold is -(1 / bandwidth) rectangle((pre - threshold) / bandwidth).
    There is none with respect to pre.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Any:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        slope = -rectangle((pre - threshold) / ctx.bandwidth) / ctx.bandwidth
        return None, sum_to(gradient * slope, threshold), None


def jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return JumpReLU.apply(pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def step_above(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return Step.apply(pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def sum_to(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a value that was broadcast from the shape of `parameter`."""
    return gradient.sum_to_size(parameter.shape)


def gated_activation(pre: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """ReLU(e^r_mag (pre - b_enc) + b_mag) where the gate is open (pre > 0), else 0 (arXiv 2404.16014).

    The gate's step has no gradient: the gate learns from its penalty and from the auxiliary loss.
    """
    magnitude = (r_mag.exp() * (pre - b_enc) + b_mag).relu()
    return torch.where(pre > 0, magnitude, 0.0)


class PrefixSums(Function):
    """`prefix_sums` with a gradient of its own, because autograd's for cumsum reverses the whole tensor twice."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, baseline: Tensor) -> Any:
        ctx.baseline_shape = baseline.shape
        out = torch.empty_like(parts)
        torch.add(parts[0], baseline, out=out[0])
        for i in range(1, len(parts)):
            torch.add(out[i - 1], parts[i], out=out[i])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        out = torch.empty_like(gradient)
        out[-1] = gradient[-1]
        for i in range(len(gradient) - 2, -1, -1):
            torch.add(out[i + 1], gradient[i], out=out[i])
        return out, out[0].sum_to_size(ctx.baseline_shape)


def prefix_sums(parts: Tensor, baseline: Tensor) -> Tensor:
    """b + parts[0], b + parts[0] + parts[1], ... for `parts` (n, rows, d) and the baseline b, (d,) or (rows, d)."""
    return PrefixSums.apply(parts.to(baseline.dtype), baseline)  # pyright: ignore[reportReturnType]


def scores(architecture: str, pre: Tensor, W_dec: Tensor) -> Tensor:
    """By what the k largest of each row are chosen."""
    match architecture:
        case "abstopk":
            return pre.abs()
        case "normtopk":
            return pre * W_dec.norm(dim=1)
        case _:
            return pre


def top_k_mask(pre: Tensor, k: int, shard: Shard = WHOLE) -> Tensor:
    """Bool mask of the k largest of each row; of a `shard`, of those that are among all ranks' k."""
    indices = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False).indices
    if not shard.is_all:
        indices = indices.sort(dim=-1).values
        candidates = pre.gather(-1, indices)
        chosen = shard.among_largest(candidates.reshape(-1, candidates.shape[-1]), k).view_as(candidates)
        return torch.zeros_like(pre, dtype=torch.bool).scatter(-1, indices, chosen)
    return torch.zeros_like(pre, dtype=torch.bool).scatter(-1, indices, True)


def batch_top_k_mask(pre: Tensor, k: int, block: Block) -> Tensor:
    """Bool mask of the k * rows largest of all rows together, also of the rows or latents that other processes have."""
    flat = pre.flatten()
    n_rows, peers = block.n_rows(pre.numel() // pre.shape[-1], pre.device), block.peers
    n = min(k * n_rows, len(flat))
    indices = flat.topk(n, sorted=False).indices
    if not peers.is_all:
        indices = indices[peers.largest(flat[indices], block.keys(indices, pre.shape[-1]), k * n_rows)]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, indices, True).view_as(pre)


def group_max_mask(pre: Tensor, k: int) -> Tensor:
    """Bool mask of the largest of each of k groups of d_sae / k neighbouring latents."""
    groups = pre.unflatten(-1, (k, -1))
    largest = groups.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, largest, True).flatten(-2)


def matching_pursuit(rows: Tensor, W_dec: Tensor, cfg: LanguageModelSAERunnerConfig) -> Tensor:
    """Activations (..., d_sae) of `rows` (..., d_in): the decoder row with the largest product with the residual is
    subtracted from it, times the product, again and again (Mallat and Zhang 1993; arXiv 2506.03093).

    A row is done after a choice that adds no latent, or once the residual's norm is below `residual_threshold`.
    """
    residual = rows.reshape(-1, rows.shape[-1])
    acts = residual.new_zeros(len(residual), len(W_dec))
    done = torch.zeros(len(residual), 1, dtype=torch.bool, device=rows.device)
    for _ in range(cfg.max_iterations or rows.shape[-1]):
        chosen = (residual @ W_dec.T).relu().argmax(dim=1, keepdim=True)
        direction = W_dec[chosen.squeeze(1)]
        value = (residual * direction).sum(dim=1, keepdim=True).relu() * ~done
        is_new = (acts.gather(1, chosen) == 0) & (value != 0)
        acts = acts.scatter_add(1, chosen, value)
        residual = residual - value * direction
        if cfg.stop_on_duplicate_support:
            done = done | ~is_new
        if cfg.residual_threshold > 0:
            done = done | (residual.norm(dim=1, keepdim=True) < cfg.residual_threshold)
        if done.all():
            break
    return acts.view(*rows.shape[:-1], len(W_dec))


def matryoshka_widths(cfg: LanguageModelSAERunnerConfig, d_sae: int) -> tuple[int, ...]:
    """Sizes of the nested dictionaries, the whole one last; () for other architectures."""
    if cfg.architecture != "matryoshka":
        return ()
    widths = cfg.matryoshka_widths or [d_sae // 2**i for i in (4, 3, 2, 1)]
    return (*(width for width in widths if 0 < width < d_sae), d_sae)


# ---------------------------------------------------------------------------------------------------------- penalties


def sparsity_penalty(
    made: Reconstruction,
    cfg: LanguageModelSAERunnerConfig,
    l1_coefficient: float,
    W_dec: Tensor,
    threshold: Tensor | None,
    whole: Whole,
) -> Tensor:
    """`l1_coefficient` times the mean over own rows of the architecture's penalty, a scalar; 0 if it has none.

    `threshold` (d_sae,) is needed for jumprelu. With `scale_sparsity_penalty_by_decoder_norm` activations are
    multiplied by the norms of the rows of `W_dec` (d_sae, d_out).
    """
    pre, acts = made.pre, made.acts
    if cfg.architecture not in WITH_PENALTY:
        return torch.zeros((), dtype=at_least_float32(acts.values.dtype), device=acts.values.device)

    def summed(values: Tensor) -> Tensor:
        return whole.shard.added(total(values))

    penalised = pre.values.relu() if cfg.architecture == "gated" else acts.values
    if cfg.scale_sparsity_penalty_by_decoder_norm:
        penalised = penalised * acts.at(W_dec.norm(dim=1))
    if threshold is None:
        return l1_coefficient * summed(lp_penalty(penalised, cfg.lp_norm)) / acts.n_rows
    if cfg.jumprelu_sparsity_loss_mode == "tanh":
        return l1_coefficient * summed((cfg.jumprelu_tanh_scale * penalised).tanh()) / acts.n_rows
    l0 = summed(step_above(pre.values, pre.at(threshold), cfg.jumprelu_bandwidth)) / acts.n_rows
    if cfg.target_l0 is None:
        return l1_coefficient * l0
    if not whole.share.is_all:  # the value is that of all rows, the gradient that of the own ones
        l0 = l0 + (whole.mean(l0) - l0.detach())
    return l1_coefficient * (l0 / cfg.target_l0 - 1).pow(2)


def total(values: Tensor) -> Tensor:
    """The sum, in float32 at least, because bfloat16 has three digits."""
    return values.sum(dtype=at_least_float32(values.dtype))


def lp_penalty(acts: Tensor, p: float) -> Tensor:
    """|activation| ** p, 0 (with a gradient of 0) where the activation is 0."""
    if p == 1:
        return acts.abs()
    active = acts > 0
    return torch.where(active, torch.where(active, acts, 1.0).pow(p), 0.0)
