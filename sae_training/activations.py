"""One frozen pass of the language model, stopped as early as possible: tokens in, activations out."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.language_model import HookSite, LanguageModel


@torch.inference_mode()
def harvest(model: LanguageModel, tokens: Tensor, site: HookSite) -> Tensor:
    """Activations (prompts, positions, d_in) at `site`, in the model's precision, of token ids (prompts, positions).

    With a head axis: the one head the site names, or all heads side by side.
    """
    _, cache = model.run_with_cache(
        tokens,
        names_filter=lambda name: name == site.read_name,
        stop_at_layer=site.stop_at_layer,
        return_cache_object=False,
    )
    return at_site(cache[site.read_name], site)


def at_site(activations: Tensor, site: HookSite) -> Tensor:
    """The vectors an autoencoder reads from a hook's tensor: (prompts, positions, d_in)."""
    if not site.head_axis:
        return activations
    if site.head_index is None:
        return activations.flatten(start_dim=-2)
    return activations[:, :, site.head_index]


def put_back(activations: Tensor, replacement: Tensor, site: HookSite) -> Tensor:
    """The hook's tensor with `replacement` (prompts, positions, d_in) in the place that `at_site` reads."""
    replacement = replacement.to(activations.dtype)
    if not site.head_axis:
        return replacement
    if site.head_index is None:
        return replacement.unflatten(-1, activations.shape[-2:])
    activations = activations.clone()
    activations[:, :, site.head_index] = replacement
    return activations
