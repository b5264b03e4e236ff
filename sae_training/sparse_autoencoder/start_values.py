"""Values that weights have before the first step: random, or from a sample of activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_training.parallel.shard import Shard

DRAWN_AT_ONCE = 2**24  # random numbers, 64 MB, of which a shard keeps its part


def initial_weights(
    d_in: int, shard: Shard, d_out: int, architecture: str, is_transcoder: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Kaiming-uniform W_enc (d_in, d_sae) and W_dec (d_sae, d_out), decoder rows of unit norm, in float32 on the CPU.

    The encoder starts as the decoder's transpose (Gao et al. 2024), which leaves far fewer latents dead. For standard
    the two are independent, as in mats. For a transcoder they are too, with encoder columns of unit norm. A shard has
    the weights that its latents have in the whole.
    """
    generator = torch.Generator().manual_seed(seed)
    everything = slice(None)
    own = everything if shard.is_all else shard.own
    W_enc = part_of_uniform(d_in, shard.d_sae, everything, own, generator)
    W_dec = part_of_uniform(shard.d_sae, d_out, own, everything, generator)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    if is_transcoder:
        W_enc = W_enc / W_enc.norm(dim=0)
    elif architecture != "standard":
        W_enc = W_dec.T.clone()
    return W_enc, W_dec


def part_of_uniform(n: int, d: int, rows: slice, columns: slice, generator: torch.Generator) -> Tensor:
    """Some rows and columns of a Kaiming-uniform matrix (n, d), of which only some rows are held at a time.

    It is drawn row after row, and its range follows from d alone, so that all of it is drawn alike in pieces.
    """
    if columns == rows == slice(None) or n * d <= DRAWN_AT_ONCE:
        return nn.init.kaiming_uniform_(torch.empty(n, d), generator=generator)[rows, columns]
    first, end, _ = rows.indices(n)
    at_once, kept = max(1, DRAWN_AT_ONCE // d), []
    for start in range(0, n, at_once):
        piece = nn.init.kaiming_uniform_(torch.empty(min(at_once, n - start), d), generator=generator)
        kept.append(piece[max(first - start, 0) : max(end - start, 0), columns].clone())
    return torch.cat(kept)


def centred_encoder(W_enc: Tensor, x: Tensor, centred_target: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """A transcoder's W_enc (d_in, d_sae) and b_enc (d_sae,), from samples of inputs `x` (rows, d_in) and of targets
    less their centre (rows, d_out).

    The encoder sees inputs around their centre, as an autoencoder's does: b_enc = -centre @ W_enc. Its columns have the
    length that gives activations the size of the targets.
    """
    centre_x = centre(x, method).to(W_enc.dtype)
    size, target_size = (x.to(W_enc.dtype) - centre_x).norm(dim=1).mean(), centred_target.norm(dim=1).mean()
    if size > 0 and target_size > 0:
        W_enc = W_enc * (target_size / size)
    return W_enc, -(centre_x @ W_enc)


def centre(rows: Tensor, method: str) -> Tensor:
    """The centre (d,) of rows (n, d): "geometric_median", "mean", or "zeros" for none."""
    match method:
        case "geometric_median":
            return geometric_median(rows)
        case "mean":
            return rows.float().mean(dim=0)
        case "zeros":
            return torch.zeros_like(rows[0])
        case other:
            raise ValueError(f"b_dec_init_method: found {other!r}, expected 'geometric_median', 'mean' or 'zeros'.")


@torch.no_grad()
def geometric_median(points: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The geometric median of `points` (rows, d), the point with the least sum of distances to them, (d,) float32.

    Weiszfeld's iteration (1937), from the mean on: each step is the average of the points weighted by 1 / distance.
    Distances are kept above 1e-6 of their median, so that an estimate that lands on a point neither divides by zero nor
    stays there. The iteration ends when a step is shorter than `tolerance` times the median distance. A few rows of
    huge norm (a BOS position) hardly move the result, unlike the mean.
    """
    points = points.float()
    median = points.mean(dim=0)
    for _ in range(max_iterations):
        distances = (points - median).norm(dim=1)
        typical = distances.median()
        weights = 1 / distances.clamp_min(torch.clamp(1e-6 * typical, min=1e-30))
        previous, median = median, (weights @ points) / weights.sum()
        if (median - previous).norm() <= tolerance * typical:
            break
    return median
