"""Open where a store's rows come from: the language model, a cache, or a cache and then the language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from sae_training.activations_store.cache import origin, position_from_json
from sae_training.activations_store.cache_reader import CachedReader, open_cache
from sae_training.activations_store.dealt_buffer import DealtBuffer
from sae_training.activations_store.passes import LiveContexts, Passes, PassesAhead
from sae_training.activations_store.position_rule import PositionRule
from sae_training.activations_store.shared_passes import SharedPasses
from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.activations_store.source import PassSource, RowSource, Taken
from sae_training.activations_store.training_text import TrainingText
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite
from sae_training.parallel.deal import Deal
from sae_training.parallel.ranks import rank
from sae_training.text.stream import TokenStream


def open_source(
    cfg: LanguageModelSAERunnerConfig,
    model: LanguageModel,
    text: TrainingText,
    sites: tuple[HookSite, ...],
    rule: PositionRule,
    hooks_of_ranks: Sequence[Sequence[str]] = (),
    deal: Deal | None = None,
) -> RowSource:
    """Open where the rows at `sites` come from: the language model, a cache, or a cache and then the language model.

    Where several processes share the passes, `hooks_of_ranks` are the hooks whose rows each of them serves, or `deal`
    gives each its part of the rows at all hooks.
    """
    device = torch.device(cfg.device)
    widths = {site.name: site.d_in for site in sites}
    live = LiveContexts(model, sites, text.tokens, device)

    def buffer(contexts: PassSource) -> ShuffleBuffer:
        passes = Passes(contexts, widths, cfg.store_batch_size, rule, model.cfg.dtype, device)
        n_rows = cfg.n_batches_in_buffer * cfg.store_batch_size * cfg.context_size
        if deal is not None:
            return DealtBuffer(passes, n_rows, deal)
        if hooks_of_ranks:
            return ShuffleBuffer(SharedPasses(passes, hooks_of_ranks), n_rows)
        return ShuffleBuffer(PassesAhead(passes) if device.type == "cuda" else passes, n_rows)

    if cfg.use_cached_activations is False:
        return buffer(live)
    cached, then_live = cached_reader(cfg, model, text, widths), cfg.use_cached_activations == "then_live"
    if cached.shards.form == "rows":  # which every rank reads by itself
        cached.shards.hooks = list(hooks_of_ranks[rank()] if hooks_of_ranks else widths)
        cached.own = None if deal is None else deal.own_of_batch
        return ThenLive(cached, buffer(live), text.tokens) if then_live else cached
    return buffer(ThenLive(cached, live, text.tokens) if then_live else cached)


def cached_reader(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel, text: TrainingText, widths: dict[str, int]
) -> CachedReader:
    """Open the cache of `cfg`. Raise ValueError if it is of another config, another model or another text."""
    path = Path(cfg.cached_activations_path or "")
    shards = open_cache(path, origin(cfg, model, text.n_held_out), widths)
    try:
        text.tokens.check_state(shards.manifest.progress["tokens"])
    except ValueError as error:
        raise ValueError(
            f"cached_activations_path: {path} was written from another text: {error}, or write another cache."
        ) from error
    text.cache = reader = CachedReader(shards, text.notify)
    return reader


Live = TypeVar("Live", ShuffleBuffer, LiveContexts)


class ThenLive(Generic[Live]):
    """Takes from `cached` while enough is left there, then from `live`, whose token ids come from `tokens`.

    Live contexts go on where the cache stops in the text.
    """

    def __init__(self, cached: CachedReader, live: Live, tokens: TokenStream) -> None:
        self.cached, self.live, self.tokens = cached, live, tokens
        self.is_live = False

    def take(self, n: int, n_left: int | None = None) -> Taken:
        if not self.is_live and self.cached.remaining() < n:
            self.cached.notify_end("from here on, activations are live")
            self.tokens.load_state_dict(position_from_json(self.cached.shards.manifest.progress["tokens"]))
            self.is_live = True
        return self.live.take(n, n_left) if self.is_live else self.cached.take(n, n_left)

    def sample(self: ThenLive[ShuffleBuffer], n: int) -> Taken:
        return self.live.sample(n) if self.is_live else self.cached.sample(n)

    def explain(self: ThenLive[LiveContexts], hook: str, found: str, /) -> str:
        return (self.live if self.is_live else self.cached).explain(hook, found)

    @property
    def n_buffered(self: ThenLive[ShuffleBuffer]) -> int:
        return self.live.n_buffered

    def check_size(self, n: int) -> None:
        self.live.check_size(n)

    def load_rows(self: ThenLive[ShuffleBuffer], part: dict[str, Any]) -> None:
        self.live.load_rows(part)

    def state_dict(self) -> dict[str, Any]:
        return self.live.state_dict() | ({"cached": None} if self.is_live else self.cached.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.live.load_state_dict(state)
        self.is_live = state["cached"] is None
        if not self.is_live:
            self.cached.load_state_dict(state)
