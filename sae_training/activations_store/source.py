"""What a store takes rows from, and what a shuffle buffer takes contexts from.

ShuffleBuffer   live: rows of the language model's passes, shuffled here
DealtBuffer     the same, where several processes keep the rows
CachedReader    rows of a cache, shuffled when they were written; or contexts of one, in the order of the text
ThenLive        a cache until its end, then the language model
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Taken = Callable[[str], Tensor]
"""What was taken, by the name of a hook: rows (n, width), or contexts (n, positions, width); of contexts also "tokens".

A function, because a buffer gathers the rows of a hook only when they are asked for. Valid until more is taken.
"""


class ContextSource(Protocol):
    """Contexts with the activations of their tokens, in the order of the text. The token ids are on the CPU."""

    def take(self, n: int, n_left: int | None = None) -> Taken:
        """Take the next `n`. `n_left`: how many will still be taken, these included (None: unknown)."""
        ...

    def check_size(self, n: int) -> None:
        """Raise ValueError if there can never be `n` to take at once."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides what is taken next."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PassSource(ContextSource, Protocol):
    """Contexts whose rows go into a shuffle buffer."""

    def explain(self, hook: str, found: str, /) -> str:
        """Return the message for activations of `hook` that hold `found`, "inf" or "NaN" (`finiteness`)."""
        ...


class RowSource(ContextSource, Protocol):
    """Rows of activations in a random order; a row is the same token at every hook."""

    @property
    def n_buffered(self) -> int:
        """How many rows of each hook this process holds in memory once some have been taken."""
        ...

    def sample(self, n: int) -> Taken:
        """Look at up to `n` rows without taking them."""
        ...

    def load_rows(self, part: dict[str, Any]) -> None:
        """Take rows from what another rank has written of its state, after `load_state_dict` of the first one's."""
        ...
