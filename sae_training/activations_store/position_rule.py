"""Which positions of a context autoencoders are trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_training.activations_store.finiteness import check_finite, explain_live
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.model_parts import ModelParts
from sae_training.language_model.sites import HookSite
from sae_training.language_model.tokenizer import tokenizer_of
from sae_training.text.stream import TokenStream

NORM_TOKENS = 8_192  # over which the median norm is taken


@dataclass(frozen=True)
class PositionRule:
    """Says which positions of a context autoencoders are trained on."""

    excluded_ids: Tensor | None = None
    """Positions with one of these token ids are left out."""
    seqpos_slice: tuple[int | None, ...] = ()
    """Start, stop and perhaps step of the positions that are kept of a sequence, padding aside; () keeps all."""
    max_norm: float | None = None
    """Positions whose activations have a larger norm are left out."""
    padded: bool = False
    """Ids below 0 are padding at the ends of contexts, and left out."""

    def keeps_all(self) -> bool:
        return not (self.padded or self.seqpos_slice) and self.excluded_ids is None and self.max_norm is None

    def __call__(self, tokens: Tensor, activations: Tensor | None = None) -> Tensor:
        """Return a bool mask like `tokens` (prompts, positions), on their device: true where a position is kept.

        A rule with `max_norm` needs the `activations` (prompts, positions, width) too, else it raises ValueError.
        """
        keep = tokens >= 0 if self.padded else torch.ones_like(tokens, dtype=torch.bool)
        if self.seqpos_slice:
            keep = positions_kept(tokens.shape[1], self.seqpos_slice).to(tokens.device)[keep.sum(dim=1)]
        if self.excluded_ids is not None:
            keep &= ~torch.isin(tokens, self.excluded_ids.to(tokens.device))
        if self.max_norm is None:
            return keep
        if activations is None:
            raise ValueError("activations: max_activation_norm_multiple is about their norms; give them too.")
        norms = activations.float().norm(dim=-1)
        # What is not finite is kept, so that it is reported: left out as too large, it would be so without a word.
        return keep & ((norms <= self.max_norm) | ~activations.isfinite().all(dim=-1)).to(tokens.device)


def positions_kept(context_size: int, seqpos_slice: tuple[int | None, ...]) -> Tensor:
    """Return bool masks (context_size + 1, context_size): row n for a sequence of n tokens, whose slice is kept."""
    kept = torch.zeros(context_size + 1, context_size, dtype=torch.bool)
    for n in range(context_size + 1):
        kept[n, range(n)[slice(*seqpos_slice)]] = True
    return kept


def position_rule(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel, tokens: TokenStream, site: HookSite
) -> PositionRule:
    """Make the rule of `cfg`. Its largest norm is a multiple of the median at `site` over the first tokens of the text.

    The median follows from the text and the model, so a run, its continuation and every later analysis agree on it.
    """
    max_norm = None
    if cfg.max_activation_norm_multiple is not None:
        max_norm = cfg.max_activation_norm_multiple * median_norms(cfg, model, tokens, [site])[site.name]
    excluded_ids = special_token_ids(model) if cfg.exclude_special_tokens else None
    return PositionRule(excluded_ids, tuple(cfg.seqpos_slice), max_norm, not cfg.pack_sequences)


def median_norms(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel, tokens: TokenStream, sites: Sequence[HookSite]
) -> Mapping[str, float]:
    """Return the median norm at each hook, by its name, over the first tokens of the text."""
    if isinstance(model, ModelParts):
        return model.median_norms
    contexts = tokens.first_contexts(math.ceil(NORM_TOKENS / cfg.context_size)).to(torch.device(cfg.device))
    passes = [
        harvest(model, prompts, sites, not cfg.pack_sequences) for prompts in contexts.split(cfg.store_batch_size)
    ]
    found: dict[str, float] = {}
    for site, parts in zip(sites, zip(*passes, strict=True), strict=True):
        every = torch.cat(parts)
        check_finite({site.name: every[contexts >= 0]}, explain_live(model))
        found[site.name] = every.float().norm(dim=-1)[contexts >= 0].median().item()
    return found


def special_token_ids(model: LanguageModel) -> Tensor:
    """Return the ids that the tokenizer calls special (BOS, EOS, padding, ...); none without a tokenizer."""
    tokenizer = tokenizer_of(model)
    return torch.tensor([] if tokenizer is None else sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
