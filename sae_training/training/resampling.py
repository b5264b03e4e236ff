"""Resampling: dead latents start again, along directions that the autoencoder reconstructs badly.

Source: Bricken et al. 2023, Towards Monosemanticity, appendix on neuron resampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.config.types import FIXED_K
from sae_training.machine.precision import in_float64
from sae_training.parallel.shard import BY_LATENT
from sae_training.parallel.share import ALONE, Share
from sae_training.sparse_autoencoder import SparseAutoencoder

ENCODER_NORM_SHARE = 0.2  # of the live latents' mean encoder norm
ROWS_AT_A_TIME = 512  # because their errors are found the dense way


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    by_latent: tuple[list[Tensor], dict[str, Tensor]],
    dead: Tensor,
    x: Tensor,
    target: Tensor,
    method: str,
    generator: torch.Generator,
    peers: Share = ALONE,
) -> Tensor:
    """Give each dead latent (`dead`, (d_sae,) bool) a new direction from rows `x` (n, d_in); return their numbers.

    Of a shard of latents, `dead` says which of them are dead, and the numbers are those among all latents. `peers` are
    the processes that hold the same latents, and draw the same rows.

    For each latent a row is drawn without replacement, with a probability proportional to its squared error ("l2") or
    to the square of that ("anthropic"). Then, where u is the unit vector along row - b_dec:

        W_dec[latent] = u    W_enc[:, latent] = u * share * mean encoder norm of the live latents    b_enc[latent] = 0

    share is 0.2, so that new latents do not disturb the loss, but 1 for a fixed k, which would not choose them
    otherwise. For a transcoder W_dec[latent] lies along the row's `target` (n, d_out) less b_dec and less what a skip
    connection adds; its encoder lies along the row less the mean row, and b_enc makes the mean row's pre-activation 0.
    jumprelu's threshold becomes the median of the live latents', gated's magnitudes start again.

    `by_latent` holds the optimizer's moments (d_sae, ...), which become 0 for these latents, and averaged weights by
    name, which take the new values. If fewer rows have an error than latents are dead, only the first latents get one.
    """
    shard = sae.shard
    numbers = shard.gathered(dead).nonzero().flatten()
    if len(numbers) == 0:
        return numbers
    x, target = sae.normalize(x), sae.normalize(target)  # `reconstruct` repeats it, which changes roundings only
    pairs = zip(x.split(ROWS_AT_A_TIME), target.split(ROWS_AT_A_TIME), strict=True)
    weight = torch.cat([in_float64(wanted - sae.reconstruct(rows)).pow(2).sum(dim=1) for rows, wanted in pairs])
    weight = peers.of_first(weight.pow(2) if method == "anthropic" else weight)
    numbers = numbers[: int((weight > 0).sum())]
    if len(numbers) == 0:
        return numbers
    drawn = torch.multinomial((weight / weight.max()).cpu(), len(numbers), generator=generator).to(x.device)
    centre = x.mean(dim=0) if sae.is_transcoder else sae.b_dec
    directions, directions_out = unit_rows(x[drawn] - centre), unit_rows(target[drawn] - sae.baseline(x[drawn]))

    share = 1.0 if sae.architecture in FIXED_K else ENCODER_NORM_SHARE
    live = shard.gathered(sae.W_enc[:, ~dead].norm(dim=0))
    norm = live.mean() if len(live) else torch.ones((), dtype=sae.dtype, device=x.device)
    thresholds = shard.gathered(sae.log_threshold[~dead]) if sae.architecture == "jumprelu" else None
    is_own, own = shard.holds(numbers), shard.own_numbers(numbers)
    sae.W_dec[own] = directions_out[is_own]
    sae.W_enc[:, own] = (directions[is_own] * share * norm).T
    sae.b_enc[own] = -(centre @ sae.W_enc[:, own]) if sae.is_transcoder else 0
    if thresholds is not None and len(live):
        sae.log_threshold[own] = thresholds.median()
    if sae.architecture == "gated":
        sae.r_mag[own] = 0
        sae.b_mag[own] = sae.b_enc[own]

    moments, averages = by_latent
    for moment in moments:
        moment[own] = 0
    for name, average in averages.items():
        place = (slice(None), own) if name == "W_enc" else own
        if name in BY_LATENT:
            average[place] = getattr(sae, name)[place]
    return numbers


def unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
