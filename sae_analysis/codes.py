"""The active latents of rows, as entries: what `sae.encode` gives, where (rows, d_sae) is never held.

A product in the encoder's fast precision gives candidates. Their pre-activations are computed again in the weights' own
precision, and the choice is made among these. `rounding` bounds what the fast product may be off, so that no candidate
is missing: a row for which this cannot be told takes the dense way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.config.types import ONLY_LOADED
from sae_training.kernels.selection import Encoder, above_threshold, top_k_of_rows
from sae_training.kernels.sparse_code import Code, Entries, offsets_of, pre_activations_at
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.objective import encoder_of, top_k_of_entries

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
    if sae.choice == "topk":
        return top_k_code(sae, x, sae_in, encoder)
    match sae.choice:
        case "batchtopk":
            limit = sae.inference_threshold.expand(sae.d_sae)
        case "jumprelu":
            limit = sae.threshold
        case _:
            limit = torch.zeros_like(sae.b_enc)
    margin = rounding(encoder, sae.W_enc) * encoder.sae_in.float().pow(4).sum(dim=1).pow(0.25).max()
    candidates = above_threshold(encoder, limit - margin - relative_error(encoder) * (limit.abs() + encoder.bias.abs()))
    if candidates is None:
        return dense_code(sae, x)
    pre = Code(exact(sae, sae_in, candidates), candidates)
    acts = sae.activation(pre)
    return positive(Code(acts * (pre.values > pre.at(limit)), candidates))


def top_k_code(sae: SparseAutoencoder, x: Tensor, sae_in: Tensor, encoder: Encoder) -> Code:
    """The code of rows with the k largest pre-activations each, chosen from the candidates of a fast product."""
    n_candidates = min(sae.d_sae, sae.k + max(8, sae.k // 2))
    entries = top_k_of_rows(encoder, n_candidates)
    pre = Code(exact(sae, sae_in, entries), entries)
    chosen = top_k_of_entries(pre, sae.k)
    acts = positive(chosen.with_values(chosen.values.relu()))
    if n_candidates == sae.d_sae:
        return acts
    # Of a latent that is no candidate, the fast product is at most that of the smallest candidate, and both are off.
    smallest_of = pre.values.view(len(x), -1).amin(dim=1)
    kth = chosen.values.view(len(x), -1).amin(dim=1).relu()
    off = rounding(encoder, sae.W_enc).max() * encoder.sae_in.float().pow(4).sum(dim=1).pow(0.25)
    off += relative_error(encoder) * (kth + encoder.bias.abs().max())
    unsure = (kth < smallest_of + 2 * off).nonzero().flatten()
    return acts if len(unsure) == 0 else with_rows(acts, unsure, dense_code(sae, x[unsure]))


def relative_error(encoder: Encoder) -> float:
    """Half a unit in the last place of the fast precision."""
    return torch.finfo(encoder.sae_in.dtype).eps / 2


def rounding(encoder: Encoder, W_enc: Tensor) -> Tensor:
    """Return (d_sae,): for a row of which the fourth powers add up to 1, how far off a fast product x . w may be.

    It adds x_i * w_i * (error of x_i + error of w_i), with errors of standard deviation u / sqrt(3) at most. By
    Cauchy-Schwarz, sum (x_i * w_i)^2 <= sqrt(sum x_i^4) * sqrt(sum w_i^4).
    """
    return SIGMAS * relative_error(encoder) * (2 / 3) ** 0.5 * W_enc.pow(4).sum(dim=0).pow(0.25)


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


def with_rows(code: Code, rows: Tensor, others: Code) -> Code:
    """The code with some `rows` (m,) replaced by those of another, (m, d_sae)."""
    entries, new = code.at_entries, others.at_entries
    stays = torch.ones(entries.n_rows, dtype=torch.bool)
    stays[rows] = False
    keep = stays[entries.rows]
    row = torch.cat([entries.rows[keep], rows[new.rows]])
    order = row.argsort(stable=True)
    latents = torch.cat([entries.latents[keep], new.latents])[order]
    values = torch.cat([code.values[keep], others.values])[order]
    return Code(values, Entries(latents, offsets_of(row[order], entries.n_rows), entries.d_sae))
