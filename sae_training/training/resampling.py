"""Resampling: dead latents start anew as directions that the autoencoder reconstructs badly.

Source: Bricken et al. 2023, Towards Monosemanticity, appendix on neuron resampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.config.types import FIXED_K
from sae_training.sparse_autoencoder import SparseAutoencoder

NOT_BY_LATENT = ("b_dec", "W_skip")  # the parameters that do not belong to latents
ENCODER_NORM_SHARE = 0.2  # of the live latents' mean encoder norm
ROWS_AT_A_TIME = 512  # encoded densely, to find their errors


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    by_latent: tuple[list[Tensor], dict[str, Tensor]],
    dead: Tensor,
    x: Tensor,
    target: Tensor,
    method: str,
    generator: torch.Generator,
) -> Tensor:
    """Give each dead latent (`dead`, (d_sae,) bool) a new direction from rows `x` (n, d_in); returns their numbers.

    A row is drawn without replacement with a probability proportional to its squared error ("l2"), or to the square
    of that ("anthropic"). Then, with u the unit vector along row - b_dec:
      W_dec[latent] = u, W_enc[:, latent] = u * share * mean encoder norm of the live latents, b_enc[latent] = 0
    (a transcoder's W_dec[latent] lies along what the row is to become, `target` (n, d_out), less b_dec and what a skip
    connection adds, and its encoder along the row less the mean row, from which b_enc measures), share being 0.2, so
    that newcomers do not disturb the loss, or 1 for a fixed k, where they would never be chosen; jumprelu's threshold
    becomes the live latents' median, gated's magnitudes start anew. `by_latent` are the optimizer's moments (d_sae,
    ...), set to 0 there, and averaged weights by name, which take the new values. With fewer rows of any error than
    dead latents, the first of these get one.
    """
    numbers = dead.nonzero().flatten()
    if len(numbers) == 0:
        return numbers
    x, target = sae.normalize(x), sae.normalize(target)  # `reconstruct` does it once more: roundings
    pairs = zip(x.split(ROWS_AT_A_TIME), target.split(ROWS_AT_A_TIME), strict=True)
    weight = torch.cat([(wanted - sae.reconstruct(rows)).double().pow(2).sum(dim=1) for rows, wanted in pairs])
    weight = weight.pow(2) if method == "anthropic" else weight
    numbers = numbers[: int((weight > 0).sum())]
    if len(numbers) == 0:
        return numbers
    drawn = torch.multinomial((weight / weight.max()).cpu(), len(numbers), generator=generator).to(x.device)
    centre = x.mean(dim=0) if sae.is_transcoder else sae.b_dec
    directions, directions_out = unit_rows(x[drawn] - centre), unit_rows(target[drawn] - sae.baseline(x[drawn]))

    share = 1.0 if sae.architecture in FIXED_K else ENCODER_NORM_SHARE
    live = sae.W_enc[:, ~dead].norm(dim=0)
    norm = live.mean() if len(live) else torch.ones((), dtype=sae.dtype, device=x.device)
    sae.W_dec[numbers] = directions_out
    sae.W_enc[:, numbers] = (directions * share * norm).T
    sae.b_enc[numbers] = -(centre @ sae.W_enc[:, numbers]) if sae.is_transcoder else 0
    if sae.architecture == "jumprelu" and len(live):
        sae.log_threshold[numbers] = sae.log_threshold[~dead].median()
    if sae.architecture == "gated":
        sae.r_mag[numbers] = 0
        sae.b_mag[numbers] = sae.b_enc[numbers]

    moments, averages = by_latent
    for moment in moments:
        moment[numbers] = 0
    for name, average in averages.items():
        place = (slice(None), numbers) if name == "W_enc" else numbers
        if name not in NOT_BY_LATENT:
            average[place] = getattr(sae, name)[place]
    return numbers


def unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
