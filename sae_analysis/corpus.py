"""The corpus of an analysis: contexts in the order of the text, numbered from 0, with the activations of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sae_analysis.sharing import is_own_lane, lane_of
from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache import origin, position_from_json, position_to_json
from sae_training.activations_store.cache_reader import CachedShards, open_cache
from sae_training.activations_store.passes import to_device
from sae_training.language_model.harvest import harvest
from sae_training.language_model.sites import HookSite
from sae_training.language_model.twins import compiled_blocks
from sae_training.machine.interrupt import stop_point


class Contexts(NamedTuple):
    """Some contexts of a corpus."""

    first: int
    """The number of the first of them."""
    lane: int
    """That of their pass (`sharing.py`)."""
    tokens: Tensor
    """(n, positions)"""
    activations: dict[HookSite, Tensor]
    """(n, positions, width) at each hook."""


class Corpus(Protocol):
    """Contexts from `done` on, pass by pass; None for a pass that another process makes.

    `state` and `done` say where another process goes on.
    """

    done: int
    n_contexts: int
    per_pass: int

    def __iter__(self) -> Iterator[Contexts | None]: ...

    def state(self) -> dict[str, Any]: ...


PASS_TOKENS = 4096  # the same for all, because sums round otherwise in other batches, and then another latent may fire


def contexts_of_a_pass(store: ActivationsStore) -> int:
    return max(1, PASS_TOKENS // store.text.cfg.context_size)


class LiveCorpus:
    """The first `n_contexts` of a store's training text (fewer, if it ends), from passes of the language model."""

    def __init__(self, store: ActivationsStore, sites: Sequence[HookSite], n_contexts: int) -> None:
        self.store, self.sites, self.n_contexts = store, sites, n_contexts
        self.per_pass = contexts_of_a_pass(store)
        self.done = 0

    def __iter__(self) -> Iterator[Contexts | None]:
        store = self.store
        while self.done < self.n_contexts:
            stop_point()
            n = min(self.per_pass, self.n_contexts - self.done)
            lane = lane_of(self.done // self.per_pass)
            tokens = to_device(store.text.tokens.next_contexts(n, until_end=True), store.device)
            if len(tokens) == 0:
                return
            contexts = None
            if is_own_lane(lane):
                with compiled_blocks():
                    found = harvest(store.model, tokens, self.sites, store.padded)
                contexts = Contexts(self.done, lane, tokens, dict(zip(self.sites, found, strict=True)))
            self.done += len(tokens)
            yield contexts

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "tokens": position_to_json(self.store.text.tokens.state_dict())}

    def go_on(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the text is another one."""
        self.store.text.tokens.load_state_dict(position_from_json(state["tokens"]))
        self.done = state["done"]


class CachedCorpus:
    """The contexts of a cache, without a pass of the language model."""

    def __init__(self, store: ActivationsStore, sites: Sequence[HookSite], n_contexts: int, folder: Path) -> None:
        widths = {site.name: site.d_in for site in sites}
        self.shards = open_cache(folder, origin(store.cfg, store.model, 0), widths)
        if self.shards.form != "contexts":
            self.shards = contexts_of(self.shards, folder)
        self.store, self.sites = store, sites
        self.n_contexts = min(n_contexts, self.shards.n)
        self.per_pass = contexts_of_a_pass(store)
        self.done = 0

    def __iter__(self) -> Iterator[Contexts | None]:
        while self.done < self.n_contexts:
            stop_point()
            lane = lane_of(self.done // self.per_pass)
            end = min(self.done + self.per_pass, self.n_contexts)
            contexts = None
            if is_own_lane(lane):
                read = self.shards.read(self.done, end)
                found = {site: to_device(read[site.name], self.store.device) for site in self.sites}
                contexts = Contexts(self.done, lane, to_device(read["tokens"], self.store.device), found)
            self.done = end
            yield contexts

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "shards": self.shards.fingerprint()}

    def go_on(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the cache is another one."""
        if state["shards"] != self.shards.fingerprint():
            raise ValueError(f"cached: {self.shards.folder} is another cache than the build was begun with.")
        self.done = state["done"]


def contexts_of(shards: CachedShards, folder: Path) -> CachedShards:
    """Return the contexts of a cache that holds rows too. ValueError for rows alone, which have lost their text."""
    if not shards.manifest.contexts:
        raise ValueError(
            f"cached: {folder} holds shuffled rows, which have no text around them; expected one written with "
            "`sae-training cache --form contexts` (or both)."
        )
    return CachedShards(folder, shards.manifest, "contexts", shards.hooks)
