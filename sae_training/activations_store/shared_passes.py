"""Passes of the language model that several processes share out: each is made by one of them, once in all.

Pass i of a round is made by rank i. A pass has the same contexts for any number of ranks, so its rows have the same
bits as those of one process alone. Where ranks train autoencoders of their own (parallel layers), the rows at a hook
then go to the ranks that need that hook, in the order of the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store.passes import Passes, n_rows_of
from sae_training.machine.interrupt import stop_point
from sae_training.parallel.ranks import agree_on_stops, exchanged, n_ranks, of_all, raised_together, rank

Made = tuple[dict[str, Any], dict[str, Tensor]]
"""The state of the passes before a pass, and its rows at the hooks of this rank."""


@dataclass(frozen=True)
class Round:
    """A pass of each rank."""

    states: list[dict[str, Any]]
    """The state of the passes before each, and after the last."""
    sizes: list[int]
    """How many rows each has."""
    own: dict[str, Tensor]
    """The rows (n, width) at each hook of the pass that was made here."""
    is_rest: bool = False
    """Whether the first pass is what was left of one, which cannot be made again."""

    @property
    def n_rows(self) -> int:
        return sum(self.sizes)

    @property
    def firsts(self) -> list[int]:
        """The number of the first row of each pass, counted from the first of the round."""
        return [sum(self.sizes[:number]) for number in range(len(self.sizes))]


def make_round(passes: Passes) -> Round:
    """Make one pass on each rank. If any of them fails, or its rows are not finite, all raise and are as before."""
    agree_on_stops()
    stop_point()
    states, own = [passes.state_dict()], {}
    try:
        with raised_together():  # bad text, which every rank reads, or what only one of them meets
            for number in range(n_ranks()):
                if number == rank():
                    own = passes.next_rows()
                else:
                    passes.skip()
                states.append(passes.state_dict())
            passes.check_finite()
    except Exception:
        passes.load_state_dict(states[0])
        raise
    return Round(states, of_all(n_rows_of(own)), own)


class SharedPasses:
    """`passes` at all hooks, of which rank r needs `hooks[r]`. The state is that before the first pass not yet used."""

    def __init__(self, passes: Passes, hooks: Sequence[Sequence[str]]) -> None:
        self.passes, self.hooks = passes, hooks
        self.widths = {hook: passes.widths[hook] for hook in hooks[rank()]}
        self.dtype, self.device = passes.dtype, passes.device
        self.made: deque[Made] = deque()

    def next_rows(self) -> dict[str, Tensor]:
        """Return the rows (n, width) of the next pass at each hook of this rank."""
        if not self.made:
            self.exchange(make_round(self.passes))
        return self.made.popleft()[1]

    def exchange(self, made: Round) -> None:
        """Send the rows made here to the ranks that need them, and take those that are needed here."""
        received = [
            {hook: torch.empty(n, width, dtype=self.dtype, device=self.device) for hook, width in self.widths.items()}
            for n in made.sizes
        ]
        to_each = [[made.own[hook].contiguous() for hook in needed] for needed in self.hooks]
        exchanged(to_each, [list(rows.values()) for rows in received])
        received[rank()] = {hook: made.own[hook] for hook in self.widths}
        self.made.extend(zip(made.states[:-1], received, strict=True))

    def check_finite(self) -> None:
        """Raise nothing: `make_round` has checked the rows."""

    def check_loaded(self, rows: Mapping[str, Tensor]) -> None:
        self.passes.check_loaded(rows)

    def check_size(self) -> None:
        self.passes.check_size()

    def state_dict(self) -> dict[str, Any]:
        return self.made[0][0] if self.made else self.passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made.clear()
        self.passes.load_state_dict(state)
