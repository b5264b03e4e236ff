"""Makes one pass of the frozen language model, stopped as early as possible: tokens in, activations out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_training.language_model.hooks import read_hooks
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite


@torch.inference_mode()
def harvest(model: LanguageModel, tokens: Tensor, sites: Sequence[HookSite], padded: bool = False) -> list[Tensor]:
    """Activations (prompts, positions, width) at each site, in the model's precision, for ids (prompts, positions).

    They are where the ids are, wherever the model's parts lie.

    `padded`: ids below 0 are padding at the ends of prompts, and masked out of attention.

    Where the hook has a head axis, they are those of the head that the site names, or of all heads side by side. Hooks
    that hold float32 in a narrower model (normalised activations do) are rounded to the model's precision.
    """
    layers = [site.stop_at_layer for site in sites]
    stop_at_layer = None if None in layers else max(layer for layer in layers if layer is not None)
    found = read_hooks(model, tokens, {site.read_name for site in sites}, stop_at_layer, padded)
    return [at_site(found[site.read_name], site).to(tokens.device, model.cfg.dtype) for site in sites]


def at_site(activations: Tensor, site: HookSite) -> Tensor:
    """The vectors (prompts, positions, d_in) that an autoencoder reads from a hook's tensor."""
    if not site.head_axis:
        return activations
    if site.head_index is None:
        return activations.flatten(start_dim=-2)
    return activations[:, :, site.head_index]


def put_back(activations: Tensor, replacement: Tensor, site: HookSite) -> Tensor:
    """The hook's tensor with `replacement` (prompts, positions, d_in) where `at_site` reads."""
    replacement = replacement.to(activations)
    if not site.head_axis:
        return replacement
    if site.head_index is None:
        return replacement.unflatten(-1, activations.shape[-2:])
    activations = activations.clone()
    activations[:, :, site.head_index] = replacement
    return activations
