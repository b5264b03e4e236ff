"""Which positions of a context autoencoders are trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite
from sae_training.language_model.tokenizer import tokenizer_of
from sae_training.text.stream import TokenStream

NORM_TOKENS = 8_192  # over which the median norm is taken


@dataclass(frozen=True)
class PositionRule:
    """Says which positions of a context autoencoders are trained on."""

    excluded_ids: Tensor | None = None
    """Positions with one of these token ids are left out."""
    seqpos_slice: tuple[int, ...] = ()
    """Start, stop and perhaps step of the positions that are kept; () keeps all."""
    max_norm: float | None = None
    """Positions whose activations have a larger norm are left out."""

    def keeps_all(self) -> bool:
        return self.excluded_ids is None and not self.seqpos_slice and self.max_norm is None

    def __call__(self, tokens: Tensor, activations: Tensor | None = None) -> Tensor:
        """Return a bool mask like `tokens` (prompts, positions), on their device: true where a position is kept.

        A rule with `max_norm` needs the `activations` (prompts, positions, width) too, else it raises ValueError.
        """
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if self.seqpos_slice:
            keep.zero_()
            keep[:, torch.arange(tokens.shape[1])[slice(*self.seqpos_slice)]] = True
        if self.excluded_ids is not None:
            keep &= ~torch.isin(tokens, self.excluded_ids.to(tokens.device))
        if self.max_norm is None:
            return keep
        if activations is None:
            raise ValueError("activations: max_activation_norm_multiple is about their norms; give them too.")
        return keep & (activations.float().norm(dim=-1) <= self.max_norm).to(tokens.device)


def position_rule(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel, tokens: TokenStream, site: HookSite
) -> PositionRule:
    """Make the rule of `cfg`. Its largest norm is a multiple of the median at `site` over the first tokens of the text.

    The median follows from the text and the model, so a run, its continuation and every later analysis agree on it.
    """
    max_norm = None
    if cfg.max_activation_norm_multiple is not None:
        contexts = tokens.first_contexts(math.ceil(NORM_TOKENS / cfg.context_size)).to(torch.device(cfg.device))
        passes = contexts.split(cfg.store_batch_size)
        norms = torch.cat([harvest(model, prompts, [site])[0].float().norm(dim=-1) for prompts in passes])
        max_norm = cfg.max_activation_norm_multiple * norms.median().item()
    excluded_ids = special_token_ids(model) if cfg.exclude_special_tokens else None
    return PositionRule(excluded_ids, tuple(cfg.seqpos_slice), max_norm)


def special_token_ids(model: LanguageModel) -> Tensor:
    """Return the ids that the tokenizer calls special (BOS, EOS, padding, ...); none without a tokenizer."""
    tokenizer = tokenizer_of(model)
    return torch.tensor([] if tokenizer is None else sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
