"""Passes of the language model, one after the other: the rows of activations that autoencoders are trained on.

tokens (prompts, positions) --language model--> activations at each hook   (or both together from a cache)
  --positions that count--> rows (n, width) at each hook
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sae_training.activations_store.finiteness import PassesChecked, check_finite, explain_live
from sae_training.activations_store.position_rule import PositionRule
from sae_training.activations_store.source import PassSource, Taken
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.sites import HookSite
from sae_training.language_model.twins import compiled_blocks
from sae_training.machine.interrupt import stop_point
from sae_training.text.stream import TokenStream


class LiveContexts:
    """Contexts of the text with the activations that the language model has at `sites`, computed when asked for."""

    def __init__(
        self, model: LanguageModel, sites: Sequence[HookSite], tokens: TokenStream, device: torch.device
    ) -> None:
        self.model, self.sites, self.tokens, self.device = model, sites, tokens, device
        self.explain = explain_live(model)

    def take(self, n: int, n_left: int | None = None) -> Taken:
        tokens = self.tokens.next_contexts(n)
        found = {"tokens": tokens}

        def taken(name: str) -> Tensor:
            if name not in found:  # contexts that another process passes through the model are only counted here
                found.update(self.activations(tokens))
            return found[name]

        return taken

    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        with compiled_blocks():
            padded = not self.tokens.pack_sequences
            activations = harvest(self.model, to_device(tokens, self.device), self.sites, padded)
        return {site.name: of_site for site, of_site in zip(self.sites, activations, strict=True)}

    def check_size(self, n: int) -> None:
        """Raise nothing: the text starts again at its end."""

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.tokens.load_state_dict(state["tokens"])
        except ValueError as error:
            raise ValueError(f"dataset_path: the data is not what the run was started on. {error}") from error


class Passes:
    """Rows of the next `n_prompts` contexts, pass after pass, in the language model's precision `dtype`.

    `widths`: the width of each hook by its name.
    """

    def __init__(
        self,
        contexts: PassSource,
        widths: dict[str, int],
        n_prompts: int,
        rule: PositionRule,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.contexts, self.widths, self.n_prompts, self.rule = contexts, widths, n_prompts, rule
        self.dtype, self.device = dtype, device
        self.checked = PassesChecked(contexts.explain)

    def next_rows(self) -> dict[str, Tensor]:
        """Return the rows (n, width) of the next pass at each hook, where the rule keeps the position.

        Whether they are finite is noted, for `check_finite` before they are used.
        """
        stop_point()  # before the contexts are taken, so that a later try makes the same pass
        rows = self.kept_rows()
        self.checked.note(rows)
        return rows

    def skip(self) -> None:
        """Leave the next pass out."""
        self.contexts.take(self.n_prompts)

    def kept_rows(self) -> dict[str, Tensor]:
        taken = self.contexts.take(self.n_prompts)
        activations = {name: to_device(taken(name).to(self.dtype), self.device) for name in self.widths}
        in_a_row = "prompts positions width -> (prompts positions) width"
        rows = {name: rearrange(x, in_a_row) for name, x in activations.items()}
        if self.rule.keeps_all():
            return rows
        # Tokens are on the CPU, so only a rule about norms makes the host wait for a GPU to count the rows.
        keep = self.rule(taken("tokens"), next(iter(activations.values())))
        places = to_device(keep.flatten().nonzero().flatten(), self.device)
        return {name: x.index_select(0, places) for name, x in rows.items()}

    def check_finite(self) -> None:
        """Raise NonFiniteActivations if rows that `next_rows` has returned are infinite or NaN."""
        self.checked.check()

    def check_loaded(self, rows: Mapping[str, Tensor]) -> None:
        """Raise NonFiniteActivations if rows that an earlier process took from these passes are infinite or NaN."""
        check_finite(rows, self.contexts.explain)

    def check_size(self) -> None:
        """Raise ValueError if there can never be a pass."""
        self.contexts.check_size(self.n_prompts)

    def state_dict(self) -> dict[str, Any]:
        return self.contexts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contexts.load_state_dict(state)
        self.checked.noted.clear()


@dataclass
class Begun:
    """A pass that was begun before its rows were needed."""

    state: dict[str, Any]
    """The state of the passes before it."""
    rows: dict[str, Tensor]
    done: Any
    """The event that its CUDA stream records after it; None on the CPU."""


class PassesAhead:
    """`passes`, begun before they are needed: on a CUDA device in a stream of their own, while autoencoders train.

    The rows and their order are those of `passes`. The state is that before the first pass which is begun and not yet
    used, so a resumed run makes these passes again. A store on the CPU does without, because no core is idle there.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.widths, self.dtype, self.device = passes.widths, passes.dtype, passes.device
        self.begun: deque[Begun] = deque()
        self.stream = None
        if passes.device.type == "cuda":
            self.stream = torch.cuda.Stream(passes.device)
            self.stream.wait_stream(torch.cuda.current_stream(passes.device))  # which still copies the model's weights

    def begin(self, n_rows: int) -> None:
        """Begin passes until `n_rows` rows are on their way."""
        while sum(n_rows_of(begun.rows) for begun in self.begun) < n_rows:
            state = self.passes.state_dict()
            with torch.cuda.stream(self.stream):  # None: nothing changes
                rows = self.passes.next_rows()
            self.begun.append(Begun(state, rows, None if self.stream is None else self.stream.record_event()))

    def next_rows(self) -> dict[str, Tensor]:
        if not self.begun:
            return self.passes.next_rows()
        begun = self.begun.popleft()
        if begun.done is not None:
            stream = torch.cuda.current_stream(self.passes.device)
            stream.wait_event(begun.done)
            for rows in begun.rows.values():
                rows.record_stream(stream)  # so that the memory is not reused before this stream is done with it
        return begun.rows

    def check_finite(self) -> None:
        self.passes.check_finite()

    def check_loaded(self, rows: Mapping[str, Tensor]) -> None:
        self.passes.check_loaded(rows)

    def check_size(self) -> None:
        self.passes.check_size()

    def state_dict(self) -> dict[str, Any]:
        return self.begun[0].state if self.begun else self.passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun.clear()
        self.passes.load_state_dict(state)


def n_rows_of(rows: dict[str, Tensor]) -> int:
    """Count the rows, of which each hook has the same number."""
    return len(next(iter(rows.values())))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`: the tensor itself if it is there, else a copy that the host does not wait for."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
