"""Resampling: dead latents start anew as directions that the autoencoder reconstructs badly.

Source: Bricken et al. 2023, Towards Monosemanticity, appendix on neuron resampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.config_checks import FIXED_K
from sae_training.sparse_autoencoder import SparseAutoencoder

ENCODER_NORM_SHARE = 0.2  # of the live latents' mean encoder norm
ROWS_AT_A_TIME = 512  # encoded densely, to find their errors


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    by_latent: tuple[list[Tensor], dict[str, Tensor]],
    dead: Tensor,
    rows: Tensor,
    method: str,
    generator: torch.Generator,
) -> Tensor:
    """Give each dead latent (`dead`, (d_sae,) bool) a new direction from `rows` (n, d_in); returns their numbers.

    A row is drawn without replacement with a probability proportional to its squared error ("l2"), or to the square
    of that ("anthropic"). Then, with u the unit vector along row - b_dec:
      W_dec[latent] = u, W_enc[:, latent] = u * share * mean encoder norm of the live latents, b_enc[latent] = 0,
    share being 0.2, so that newcomers do not disturb the loss, or 1 for a fixed k, where they would never be chosen;
    jumprelu's threshold becomes the live latents' median, gated's magnitudes start anew. `by_latent` are the
    optimizer's moments (d_sae, ...), set to 0 there, and averaged weights by name, which take the new values. With
    fewer rows of any error than dead latents, the first of these get one.
    """
    numbers = dead.nonzero().flatten()
    if len(numbers) == 0:
        return numbers
    rows = rows.to(sae.dtype)
    chunks = rows.split(ROWS_AT_A_TIME)
    weight = torch.cat([(chunk - sae(chunk).sae_out).double().pow(2).sum(dim=1) for chunk in chunks])
    weight = weight.pow(2) if method == "anthropic" else weight
    numbers = numbers[: int((weight > 0).sum())]
    if len(numbers) == 0:
        return numbers
    drawn = torch.multinomial((weight / weight.max()).cpu(), len(numbers), generator=generator).to(rows.device)
    directions = rows[drawn] - sae.b_dec
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(torch.finfo(sae.dtype).tiny)

    share = 1.0 if sae.architecture in FIXED_K else ENCODER_NORM_SHARE
    live = sae.W_enc[:, ~dead].norm(dim=0)
    norm = live.mean() if len(live) else torch.ones((), dtype=sae.dtype, device=rows.device)
    sae.W_dec[numbers] = directions
    sae.W_enc[:, numbers] = (directions * share * norm).T
    sae.b_enc[numbers] = 0
    if sae.architecture == "jumprelu" and len(live):
        sae.log_threshold[numbers] = sae.log_threshold[~dead].median()
    if sae.architecture == "gated":
        sae.r_mag[numbers] = 0
        sae.b_mag[numbers] = 0

    moments, averages = by_latent
    for moment in moments:
        moment[numbers] = 0
    for name, average in averages.items():
        place = (slice(None), numbers) if name == "W_enc" else numbers
        if name != "b_dec":
            average[place] = getattr(sae, name)[place]
    return numbers
