"""The active latents of rows, as entries: what `sae.encode` gives, where (rows, d_sae) is never held.

A product in the encoder's fast precision gives candidates. Their pre-activations are computed again in the weights' own
precision, and the choice is made among these. `rounding` bounds what the fast product may be off, so that no candidate
is missing: a row for which this cannot be told takes a product in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.config.types import ONLY_LOADED
from sae_training.kernels.selection import Encoder, above_threshold, top_k_of_rows
from sae_training.kernels.sparse_code import Code, Entries, fixed_size_entries, offsets_of, pre_activations_at
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.objective import encoder_of, top_k_of_entries

TILE_ELEMENTS = 2**24  # of the fast product: here larger tiles are faster, because little else wants the memory
SIGMAS = 6  # of a rounding error, of which a product has one for each of its 2 * d_in factors


@torch.no_grad()
def code_of(sae: SparseAutoencoder, x: Tensor) -> Code:
    """Return the entries above 0 of `sae.encode(x)` for rows `x` (n, d_in), row after row, in the weights' precision.

    The autoencoder must be in evaluation mode.
    """
    if sae.device.type != "cpu" or len(x) == 0 or sae.architecture in ONLY_LOADED:
        return dense_code(sae, x)
    sae_in = sae.sae_input(sae.normalize(x))
    encoder = encoder_of(sae, sae_in, sae.W_enc, sae.b_enc)
    encoder.tile_rows = max(1, TILE_ELEMENTS // encoder.tile_latents)
    if sae.choice == "topk":
        return top_k_code(sae, sae_in, encoder)
    match sae.choice:
        case "batchtopk":
            limit = sae.inference_threshold.expand(sae.d_sae)
        case "jumprelu":
            limit = sae.threshold
        case _:
            limit = torch.zeros_like(sae.b_enc)
    of_row, of_latent = rounding(encoder, sae.W_enc)
    off = of_latent * of_row.max() + relative_error(encoder) * (limit.abs() + encoder.bias.abs())
    candidates = above_threshold(encoder, limit - off)
    if candidates is None:
        return dense_code(sae, x)
    pre = Code(exact(sae, sae_in, candidates), candidates)
    acts = sae.activation(pre)
    return positive(Code(acts * (pre.values > pre.at(limit)), candidates))


def top_k_code(sae: SparseAutoencoder, sae_in: Tensor, encoder: Encoder) -> Code:
    """The code of rows with the k largest pre-activations each, chosen from the candidates of a fast product."""
    n_candidates = min(sae.d_sae, 2 * sae.k + 8)
    entries = top_k_of_rows(encoder, n_candidates)
    pre = Code(exact(sae, sae_in, entries), entries)
    chosen = top_k_of_entries(pre, sae.k)
    values, latents = (part.view(-1, sae.k) for part in (chosen.values, chosen.at_entries.latents))
    if n_candidates < sae.d_sae:
        # The fast product of a latent that is no candidate is at most that of any candidate: of the weakest, above all.
        weakest = pre.values.view(len(sae_in), -1).argmin(dim=1, keepdim=True)
        its_latent = entries.latents.view(len(sae_in), -1).gather(1, weakest).squeeze(1)
        bias = encoder.bias
        fast = torch.linalg.vecdot(encoder.sae_in.float(), encoder.table[its_latent].float()) + bias[its_latent]
        of_row, of_latent = rounding(encoder, sae.W_enc)
        off = of_row * of_latent.max() + 2 * relative_error(encoder) * (fast.abs() + bias.abs().max())
        unsure = (values.amin(dim=1).relu() < fast + off).nonzero().flatten()
        if len(unsure) > 0:
            again = Encoder(sae_in[unsure].to(sae.W_enc.dtype), sae.W_enc, sae.b_enc, sae.W_enc.dtype)
            better = top_k_of_rows(again, sae.k)
            values[unsure] = exact(sae, sae_in[unsure], better).view(-1, sae.k)
            latents[unsure] = better.latents.view(-1, sae.k)
    return positive(Code(values.flatten(), fixed_size_entries(latents, sae.d_sae)))


def relative_error(encoder: Encoder) -> float:
    """Half a unit in the last place of the fast precision."""
    return torch.finfo(encoder.sae_in.dtype).eps / 2


def rounding(encoder: Encoder, W_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows,) and (d_sae,), whose products say how far off a fast product x . w may be before it is rounded.

    It adds x_i * w_i * (error of x_i + error of w_i), with errors of standard deviation u / sqrt(3) at most. By
    Cauchy-Schwarz, sum (x_i * w_i)^2 <= sqrt(sum x_i^4 / s_i) * sqrt(sum w_i^4 * s_i) for any s. The mean square of x_i
    over the rows makes it nearly the least where some coordinates are much larger than others.
    """
    x = encoder.sae_in.float()
    squares = x.pow(2)
    s = squares.mean(dim=0).clamp_min(1e-30)
    of_row = (squares.pow(2) @ s.reciprocal()).pow(0.25)
    of_latent = (s @ W_enc.float().square().square()).pow(0.25)
    return of_row, SIGMAS * relative_error(encoder) * (2 / 3) ** 0.5 * of_latent


def exact(sae: SparseAutoencoder, sae_in: Tensor, entries: Entries) -> Tensor:
    return pre_activations_at(entries, sae_in.to(sae.W_enc.dtype), sae.input_bias, sae.W_enc, sae.b_enc)


def dense_code(sae: SparseAutoencoder, x: Tensor) -> Code:
    acts = sae.encode(x)
    rows, latents = (acts > 0).nonzero(as_tuple=True)
    return Code(acts[rows, latents], Entries(latents, offsets_of(rows, len(x)), sae.d_sae))


def positive(code: Code) -> Code:
    """The code without its entries that are not above 0."""
    entries, keep = code.at_entries, code.values > 0
    offsets = offsets_of(entries.rows[keep], entries.n_rows)
    return Code(code.values[keep], Entries(entries.latents[keep], offsets, entries.d_sae))
