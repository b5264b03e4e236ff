"""Autoencoders in another form that compute the same: for exchange, for inference, for comparison."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.fields import OPTION_OF
from sae_training.config.types import FIXED_K
from sae_training.sparse_autoencoder.definition import SparseAutoencoder
from sae_training.sparse_autoencoder.normalization import BY_ROW


@torch.no_grad()
def fold_decoder_norms(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same function with decoder rows of unit norm: what W_dec's rows lose in length, the activations gain.

    For architectures whose activation scales with the pre-activation: standard, jumprelu (its thresholds scale along)
    and gated. A fixed k chooses by size among all latents, which scaling would change: ValueError unless the rows have
    unit norm already. Rows of zeros stay.
    """
    norms = sae.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    if sae.architecture in FIXED_K and not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        raise ValueError(
            f"fold_decoder_norms: architecture {sae.architecture} chooses latents by the size of their activations, "
            "which folding would change; convert it with to_jumprelu first."
        )
    folded = copy.deepcopy(sae)
    if sae.architecture in FIXED_K:
        return folded
    folded.W_dec.div_(norms.unsqueeze(1))
    if sae.architecture == "gated":
        folded.r_mag.add_(norms.log())
        folded.b_mag.mul_(norms)
        return folded
    folded.W_enc.mul_(norms)
    folded.b_enc.mul_(norms)
    if sae.architecture == "jumprelu":
        folded.log_threshold.add_(norms.log())
    return folded


@torch.no_grad()
def fold_input_scale(sae: SparseAutoencoder, scale: float, target_scale: float | None = None) -> SparseAutoencoder:
    """The autoencoder for raw activations x, given one trained on scale * x: codes and outputs come in raw units.

    The decoder's rows keep their norms. A transcoder may have been trained to predict target_scale * target; None is
    `scale`. 1 / scale turns it back.
    """
    target_scale = scale if target_scale is None else target_scale
    for name, factor in (("scale", scale), ("target_scale", target_scale)):
        if not factor > 0:
            raise ValueError(
                f"{name}: found {factor}, expected a number above 0, the factor that training multiplied with."
            )
    if sae.normalization in BY_ROW and scale != 1:
        raise ValueError(
            f"scale: found {scale} with normalize_activations {sae.normalization}, expected 1: it gives the same codes "
            "whatever its input is multiplied by."
        )
    if not sae.is_transcoder and scale != target_scale:
        raise ValueError(f"target_scale: found {target_scale}, expected scale = {scale}: this is not a transcoder.")
    folded = copy.deepcopy(sae)
    folded.W_enc.mul_(scale / target_scale)
    for offset in (folded.b_enc, folded.b_dec):
        offset.div_(target_scale)
    if folded.architecture == "jumprelu":
        folded.log_threshold.sub_(math.log(target_scale))
    if folded.architecture == "gated":
        folded.b_mag.div_(target_scale)
    if folded.choice == "batchtopk":
        folded.inference_threshold.div_(target_scale)
    if folded.has_skip_connection:
        folded.W_skip.mul_(scale / target_scale)
    return folded


@torch.no_grad()
def to_jumprelu(sae: SparseAutoencoder, rows: Tensor | None = None) -> SparseAutoencoder:
    """A jumprelu autoencoder in place of a fixed k: a latent is active where its pre-activation exceeds one threshold.

    For batchtopk that is what inference does anyway, and the function stays the same. topk and matryoshka with topk
    have no such threshold: it is taken from `rows` (n, d_in), so that k are active a row on average.
    """
    if sae.architecture not in FIXED_K:
        raise ValueError(f"to_jumprelu: found architecture {sae.architecture}, expected one of {', '.join(FIXED_K)}.")
    if sae.choice == "batchtopk":
        threshold = sae.inference_threshold.clone()
    elif rows is None:
        raise ValueError("to_jumprelu: topk needs `rows`, activations (n, d_in), to take its threshold from.")
    else:
        pre = sae.pre_activations(sae.sae_input(sae.normalize(rows))).relu().flatten()
        threshold = pre.kthvalue(max(1, len(pre) - sae.k * len(rows))).values
    converted = SparseAutoencoder(with_architecture(sae.cfg, "jumprelu"))
    tensors = dict(sae.weights())
    tensors.pop("inference_threshold", None)
    start = threshold.clamp_min(torch.finfo(sae.dtype).tiny).log().to(sae.dtype)
    converted.load_state_dict({**tensors, "log_threshold": start.expand(sae.d_sae).clone()})
    return converted.train(sae.training)


def with_architecture(cfg: Any, architecture: str) -> Any:
    """The config with another architecture, and without the options that only the old one has."""
    changed = copy.copy(cfg)
    others = [name for name, owners in OPTION_OF.items() if architecture not in owners]
    defaults = {name: getattr(LanguageModelSAERunnerConfig, name) for name in others}
    vars(changed).update(defaults, architecture=architecture)
    return changed
