"""Which positions of a pass an intervention changes: those the autoencoder is trained on, all, or those of a mask."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sae_training.activations_store.position_rule import PositionRule, special_token_ids
from sae_training.language_model.load import LanguageModel
from sae_training.sparse_autoencoder import SparseAutoencoder

Positions = Literal["trained", "all"] | Tensor | PositionRule
"""What a user gives."""
Where = Tensor | PositionRule | None
"""What it means: a mask, a rule about token ids and norms, or everywhere."""


def where_of(positions: Positions, model: LanguageModel, sae: SparseAutoencoder) -> Where:
    """What `positions` means for `sae` in `model`; ValueError if it means nothing."""
    match positions:
        case "all":
            return None
        case "trained":
            return rule_of(sae, model)
        case PositionRule():
            return None if positions.keeps_all() else positions
        case Tensor() if positions.dtype == torch.bool and positions.ndim in (1, 2):
            return positions
    is_tensor = isinstance(positions, Tensor)
    found = f"a tensor of {positions.dtype}, {tuple(positions.shape)}" if is_tensor else repr(positions)
    raise ValueError(
        f"positions: found {found}, expected 'trained', 'all', a bool tensor (positions,) or (prompts, positions), or "
        "the rule of a store."
    )


def rule_of(sae: SparseAutoencoder, model: LanguageModel) -> PositionRule | None:
    """The rule by which `sae` was trained; None if it was trained on every position."""
    cfg = sae.full_cfg
    if cfg.max_activation_norm_multiple is not None:
        raise ValueError(
            "positions: this autoencoder has max_activation_norm_multiple, a multiple of the median norm in its text; "
            "give positions=store.rule, of the store that the session loader returns, or 'all'."
        )
    rule = PositionRule(special_token_ids(model) if cfg.exclude_special_tokens else None, tuple(cfg.seqpos_slice))
    return None if rule.keeps_all() else rule


def mask_of(where: Where, tokens: Tensor | None, x: Tensor) -> Tensor | None:
    """A bool tensor, true at the (prompts, positions) of a pass that are changed; None: all.

    `tokens` are the pass's ids, and `x` (prompts, positions, width) is what the autoencoder reads.
    """
    shape = x.shape[:2]
    match where:
        case None:
            return None
        case Tensor():
            if where.shape not in (shape, shape[1:]):
                raise ValueError(
                    f"positions: found a mask {tuple(where.shape)} in a pass over {tuple(shape)} (prompts, positions); "
                    "give one for these prompts."
                )
            return where.to(x.device).expand(shape)
    if tokens is None or tokens.shape != shape:
        raise ValueError(
            "positions: found a pass without token ids, which say where the autoencoder is trained; give a mask, or "
            "'all'."
        )
    if where.seqpos_slice and shape[1] == 1:
        raise ValueError(
            "positions: found a pass over one position, but seqpos_slice counts from the beginning of the text; "
            "generate with use_past_kv_cache=False, or give positions='all'."
        )
    return where(tokens, x).to(x.device)
