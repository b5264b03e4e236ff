"""Rewrite an autoencoder's tensors to another form of the same function: same activations, same output.

What another program does around its weights when they are used (multiplying by norms or factors, whitening) becomes
part of the weights. All functions take and return dicts of tensors under our names, and change the tensors in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def latent_by_latent(W_enc: Tensor) -> Tensor:
    """W_enc (d_in, d_sae) as it lies in our memory: the weights of a latent side by side. Copies unless it is so."""
    return W_enc.T.contiguous().T


@torch.no_grad()
def scale_decoder(tensors: Tensors, factors: Tensor) -> None:
    """Multiply activations by `factors` (d_sae,) where they are decoded, and only there."""
    tensors["W_dec"].mul_(factors.to(tensors["W_dec"]).unsqueeze(1))


@torch.no_grad()
def fold_decoder_norms(tensors: Tensors) -> None:
    """For a program that multiplies pre-activations by the norms of W_dec's rows, and divides by them to decode.

    Rows of zeros, whose latents it never activates, get an encoder of zeros.
    """
    norms = tensors["W_dec"].norm(dim=1)
    tensors["W_dec"].div_(torch.where(norms > 0, norms, 1.0).unsqueeze(1))
    tensors["W_enc"].mul_(norms)
    tensors["b_enc"].mul_(norms)


@torch.no_grad()
def fold_norm_factor(tensors: Tensors, factor: float, factor_of_output: float | None = None) -> None:
    """For a program that gives `factor` * x to these weights, and divides their output by it (or by the other)."""
    factor_of_output = factor if factor_of_output is None else factor_of_output
    tensors["W_enc"].mul_(factor)
    tensors["W_dec"].div_(factor_of_output)
    tensors["b_dec"].div_(factor_of_output)


@torch.no_grad()
def fold_subtraction(tensors: Tensors) -> None:
    """For a program that subtracts b_dec from the input of a transcoder too."""
    tensors["b_enc"].sub_(tensors["b_dec"] @ tensors["W_enc"])


@torch.no_grad()
def scale_activations(tensors: Tensors, factor: float) -> None:
    """Multiply the latent activations of an encoder without thresholds by `factor`; the output stays."""
    tensors["W_enc"].mul_(factor)
    tensors["b_enc"].mul_(factor)
    tensors["W_dec"].div_(factor)


@torch.no_grad()
def fold_whitening(tensors: Tensors, mean: Tensor, matrix: Tensor, inverse: Tensor, subtracts_b_dec: bool) -> None:
    """For a program that gives (x - mean) @ matrix to these weights, and returns their output @ inverse + mean.

    Computed in the precision of `matrix`, which SAELens saves in float64.
    """
    W_enc = matrix @ tensors["W_enc"].to(matrix)
    if not subtracts_b_dec:  # else the new b_dec holds the mean
        shift = (mean.to(matrix) @ W_enc).to(tensors["b_enc"])
        tensors["b_enc"].sub_(shift)
        if "b_mag" in tensors:
            tensors["b_mag"].sub_(tensors["r_mag"].exp() * shift)
    tensors["W_enc"] = latent_by_latent(W_enc.to(tensors["W_enc"].dtype))
    tensors["W_dec"] = (tensors["W_dec"].to(inverse) @ inverse).to(tensors["W_dec"].dtype)
    tensors["b_dec"] = (tensors["b_dec"].to(inverse) @ inverse + mean.to(inverse)).to(tensors["b_dec"].dtype)


@torch.no_grad()
def fold_normaliser(tensors: Tensors, mean: Tensor, scale: Tensor, least: float) -> None:
    """For a program that gives (x - mean) * scale to these weights, and returns output / (scale + least) + mean.

    b_dec is subtracted from the input there and here.
    """
    factor = scale.double() + least
    rest = tensors["b_dec"].double() * (scale.double() / factor - 1)  # of b_dec, by what both factors differ
    tensors["b_enc"].add_(rest.to(tensors["b_enc"]) @ tensors["W_enc"])
    tensors["W_enc"].mul_(scale)
    tensors["W_dec"].div_(factor)
    tensors["b_dec"].div_(factor).add_(mean)


@torch.no_grad()
def log_thresholds(threshold: Tensor) -> Tensor:
    """The log_threshold (d_sae,) of thresholds: the least whose exp is not below the threshold.

    So a pre-activation that equals the threshold stays inactive, as "pre > threshold" has it. Thresholds of 0 and less
    are -inf: pre-activations below 0 are inactive in any case.
    """
    threshold = threshold.clamp_min(0)
    log = threshold.log()
    up = torch.full_like(log, torch.inf)
    for _ in range(4):
        log = torch.where(log.exp() < threshold, log.nextafter(up), log)
    return log
