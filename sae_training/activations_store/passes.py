"""Passes of the language model, one after the other: the rows of activations that autoencoders are trained on.

tokens (prompts, context) --language model, or contexts of a cache in its place--> activations at each site
  --positions that count--> rows (n, width) at each site
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store.cache_reader import CachedReader
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite
from sae_training.language_model.twins import compiled_blocks
from sae_training.text.stream import TokenStream


@dataclass(frozen=True)
class PositionRule:
    """Which positions of a context autoencoders are trained on."""

    excluded_ids: Tensor | None = None
    """Token ids that are left out."""
    seqpos_slice: tuple[int, ...] = ()
    """Start, stop and perhaps step of the positions that are kept; () keeps all."""
    max_norm: float | None = None
    """Rows that are longer are left out."""

    def keeps_all(self) -> bool:
        return self.excluded_ids is None and not self.seqpos_slice and self.max_norm is None

    def __call__(self, tokens: Tensor, activations: Tensor | None = None) -> Tensor:
        """Bool mask of the shape of `tokens` (prompts, context), on their device.

        With `max_norm`, ValueError without the `activations` (prompts, context, width) at them.
        """
        keep = self.by_token(tokens)
        if self.max_norm is None:
            return keep
        if activations is None:
            raise ValueError("activations: max_activation_norm_multiple is about their norms; give them too.")
        return keep & (activations.float().norm(dim=-1) <= self.max_norm).to(tokens.device)

    def by_token(self, tokens: Tensor) -> Tensor:
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if self.seqpos_slice:
            keep.zero_()
            keep[:, torch.arange(tokens.shape[1])[slice(*self.seqpos_slice)]] = True
        return keep if self.excluded_ids is None else keep & ~torch.isin(tokens, self.excluded_ids.to(tokens.device))


class Passes:
    """Rows of the next `n_prompts` prompts at each site, again and again, from a position in the text on.

    `cached`, contexts in the order of the text, takes the language model's place; with `then_live`, until its end.
    """

    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[HookSite],
        tokens: TokenStream,
        n_prompts: int,
        rule: PositionRule,
        device: torch.device,
        cached: CachedReader | None = None,
        then_live: bool = False,
    ) -> None:
        self.model, self.sites, self.tokens = model, tuple(sites), tokens
        self.n_prompts, self.rule, self.device = n_prompts, rule, device
        self.cached, self.then_live = cached, then_live

    def next_rows(self) -> list[Tensor]:
        """Rows (n, width) of the next pass at each site, in the model's precision."""
        if self.cached is not None and self.then_live and self.cached.remaining() < self.n_prompts:
            self.go_live(self.cached)
            self.cached = None
        if self.cached is None:
            tokens = self.tokens.next_contexts(self.n_prompts)
            with compiled_blocks():
                found = harvest(self.model, to_device(tokens, self.device), self.sites)
        else:
            read = self.cached.take(self.n_prompts)
            tokens = read["tokens"]
            found = [to_device(read[site.name].to(self.model.cfg.dtype), self.device) for site in self.sites]
        return self.rows(tokens, found)

    def rows(self, tokens: Tensor, found: list[Tensor]) -> list[Tensor]:
        """What the rule keeps of the activations (prompts, context, width) at `tokens`.

        The tokens are on the CPU: only a rule about norms has to wait for a GPU to know how many rows there are.
        """
        flat = [activations.flatten(end_dim=1) for activations in found]
        if self.rule.keeps_all():
            return flat
        places = to_device(self.rule(tokens, found[0]).flatten().nonzero().flatten(), self.device)
        return [rows.index_select(0, places) for rows in flat]

    def go_live(self, cached: CachedReader) -> None:
        """Go on in the text where the cache stops."""
        cached.notify_end("from here on, activations are live")
        self.go_to(cached.shards.manifest.progress["tokens"])

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on at a position in the text as a cache's manifest has it, in JSON."""
        self.tokens.load_state_dict(position | {"pending": torch.tensor(position["pending"], dtype=torch.int64)})

    def state_dict(self) -> dict[str, Any]:
        """The position in the text and in the cache."""
        return {
            "tokens": self.tokens.state_dict(),
            "cached": None if self.cached is None else self.cached.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.tokens.load_state_dict(state["tokens"])
        except ValueError as error:
            raise ValueError(f"dataset_path: the data is not what the run was started on. {error}") from error
        if state.get("cached") is None:
            self.cached = None  # it had come to its end
        elif self.cached is not None:
            self.cached.load_state_dict(state["cached"])


@dataclass
class Begun:
    """A pass that was begun ahead of need."""

    state: dict[str, Any]
    """Of the passes, before it."""
    rows: list[Tensor]
    done: Any
    """An event of its stream; None where there is none."""


class PassesAhead:
    """`passes`, begun ahead of need: on a CUDA device in a stream of their own, while others train.

    The rows and their order are those of `passes`. What was begun and not yet used does not count in the state: whoever
    goes on from it makes these passes again. A CPU has no cores to spare for this, so its store does not ask for it.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.begun: deque[Begun] = deque()
        self.stream = None
        if passes.device.type == "cuda":
            self.stream = torch.cuda.Stream(passes.device)
            self.stream.wait_stream(torch.cuda.current_stream(passes.device))  # which still copies the model's weights

    def begin(self, n_rows: int) -> None:
        """Begin passes until `n_rows` rows are on their way."""
        while sum(len(pass_.rows[0]) for pass_ in self.begun) < n_rows:
            state = self.passes.state_dict()
            with torch.cuda.stream(self.stream):  # None: nothing changes
                rows = self.passes.next_rows()
            self.begun.append(Begun(state, rows, None if self.stream is None else self.stream.record_event()))

    def next_rows(self) -> list[Tensor]:
        if not self.begun:
            return self.passes.next_rows()
        pass_ = self.begun.popleft()
        if pass_.done is not None:
            stream = torch.cuda.current_stream(self.passes.device)
            stream.wait_event(pass_.done)
            for rows in pass_.rows:
                rows.record_stream(stream)  # its memory is not for others until this stream is done with it
        return pass_.rows

    def state_dict(self) -> dict[str, Any]:
        return self.begun[0].state if self.begun else self.passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun.clear()
        self.passes.load_state_dict(state)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for where the device is a GPU; on the CPU, the tensor itself."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
