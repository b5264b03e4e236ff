"""Passes of the language model that several processes share out: each is made by one of them, once in all.

Pass i of a round is made by rank i. Its rows at a hook then go to the ranks that need that hook. So every rank gets the
rows of all passes at its hooks, in the order of the text, with the same bits as one process alone: a pass has the same
contexts for any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store.finiteness import PassesChecked
from sae_training.activations_store.passes import Passes, n_rows_of
from sae_training.machine.interrupt import stop_point
from sae_training.parallel.ranks import agree_on_stops, exchanged, n_ranks, of_all, raise_together, rank

Made = tuple[dict[str, Any], dict[str, Tensor]]
"""The state of the passes before a pass, and its rows at the hooks of this rank."""


class SharedPasses:
    """`passes` at all hooks, of which rank r needs `hooks[r]`. The state is that before the first pass not yet used."""

    def __init__(self, passes: Passes, hooks: Sequence[Sequence[str]]) -> None:
        self.passes, self.hooks = passes, hooks
        self.widths = {hook: passes.widths[hook] for hook in hooks[rank()]}
        self.dtype, self.device = passes.dtype, passes.device
        self.checked = PassesChecked(passes.contexts.explain)
        self.made: deque[Made] = deque()

    def next_rows(self) -> dict[str, Tensor]:
        """Return the rows (n, width) of the next pass at each hook of this rank."""
        if not self.made:
            self.make_round()
        return self.made.popleft()[1]

    def make_round(self) -> None:
        """Make one pass on each rank, and exchange the rows."""
        agree_on_stops()
        stop_point()
        states, own, error = [self.passes.state_dict()], {}, None
        try:
            for number in range(n_ranks()):
                if number == rank():
                    own = self.passes.kept_rows()
                else:
                    self.passes.skip()
                states.append(self.passes.state_dict())
        except Exception as caught:  # bad text, which every rank reads, or what only one of them meets
            error = caught
        try:
            raise_together(error)
        except Exception:
            self.passes.load_state_dict(states[0])
            raise
        sizes = of_all(n_rows_of(own))
        received = [
            {hook: torch.empty(n, width, dtype=self.dtype, device=self.device) for hook, width in self.widths.items()}
            for n in sizes
        ]
        to_each = [[own[hook].contiguous() for hook in needed] for needed in self.hooks]
        exchanged(to_each, [list(rows.values()) for rows in received])
        received[rank()] = {hook: own[hook] for hook in self.widths}
        for state, rows in zip(states[:-1], received, strict=True):
            self.checked.note(rows)
            self.made.append((state, rows))

    def check_finite(self) -> None:
        """Raise NonFiniteActivations if rows that `next_rows` has returned are infinite or NaN."""
        self.checked.check()

    def check_loaded(self, rows: Mapping[str, Tensor]) -> None:
        self.passes.check_loaded(rows)

    def check_size(self) -> None:
        self.passes.check_size()

    def state_dict(self) -> dict[str, Any]:
        return self.made[0][0] if self.made else self.passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made.clear()
        self.checked.noted.clear()
        self.passes.load_state_dict(state)
