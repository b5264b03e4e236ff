"""Convert autoencoders to other forms of the same function, for exchange, inference and comparison."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.fields import OPTION_OF
from sae_training.config.types import FIXED_K, ONLY_LOADED
from sae_training.sparse_autoencoder.definition import SparseAutoencoder
from sae_training.sparse_autoencoder.normalization import BY_ROW


@torch.no_grad()
def fold_decoder_norms(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same function with decoder rows of unit norm: activations are multiplied by the norms that rows had before.

    This works for standard, gated and jumprelu (whose thresholds are multiplied too), because their activations scale
    with the pre-activations. A fixed k chooses latents by size, which scaling would change: such an autoencoder is
    returned as it is if its rows have unit norm already, else ValueError is raised. Rows of zeros stay zero.
    """
    norms = sae.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    stays = sae.architecture in (*FIXED_K, *ONLY_LOADED) or sae.full_cfg.activation_fn != "relu"
    if stays and not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        raise ValueError(
            f"fold_decoder_norms: architecture {sae.architecture} chooses latents by the size of their activations, "
            "or bends it, which folding would change; of a fixed k, convert it with to_jumprelu first."
        )
    folded = copy.deepcopy(sae)
    if stays:
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
    """The autoencoder for raw activations x, from one trained on scale * x; its codes and outputs are in raw units.

    The decoder's rows keep their norms. `target_scale` is the factor of a transcoder's targets in training; None means
    `scale`. Folding by 1 / scale undoes it.
    """
    target_scale = scale if target_scale is None else target_scale
    for name, factor in (("scale", scale), ("target_scale", target_scale)):
        if not factor > 0:
            raise ValueError(
                f"{name}: found {factor}, expected a number above 0, the factor that training multiplied with."
            )
    if sae.architecture == "matching_pursuit" or sae.full_cfg.activation_fn != "relu":
        raise ValueError(f"fold_input_scale: {sae.architecture} {sae.full_cfg.activation_fn} does not scale with x.")
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
    """A jumprelu autoencoder in place of one with a fixed k: latents are active above one threshold, the same for all.

    batchtopk uses such a threshold at inference, so its function stays the same. For topk, and matryoshka with topk,
    the threshold is chosen so that on average k latents are active on each of `rows` (n, d_in).
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
    """The config with another architecture; options that this one does not have take their defaults."""
    changed = copy.copy(cfg)
    others = [name for name, owners in OPTION_OF.items() if architecture not in owners]
    defaults = {name: getattr(LanguageModelSAERunnerConfig, name) for name in others}
    vars(changed).update(defaults, architecture=architecture)
    return changed
