"""The shuffle buffer: rows come in in the order of the text, and go out in a random order.

The buffer is allocated once. Batches are drawn from it in a random order. When half of its rows have been served, new
rows overwrite exactly those in place, and a new order is drawn. So a row waits for two refills on average, and each
batch mixes tokens of many prompts. Rows keep the language model's own precision, so nothing is lost.

Near the end of a run the buffer is not refilled: the rows left in it are enough. This saves up to half a buffer of
forward passes.

Each hook has its buffer, and all are served in the same order: row i is the same token at every hook. The order depends
on the size of the buffer alone, so an autoencoder gets the same batches whichever others are trained beside it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store.passes import Passes, PassesAhead, n_rows_of, to_device
from sae_training.activations_store.shared_passes import SharedPasses
from sae_training.activations_store.source import Taken
from sae_training.machine.phases import phase, progress_bar

SHUFFLE_SEED = 42  # the same in all runs, so that runs with different seeds see the same batches
MAX_EMPTY_PASSES = 20  # in a row, after which the position rules are taken to exclude everything


class ShuffleBuffer:
    """`n_rows` rows of `passes` at each hook, served in a random order; filled when rows are first asked for."""

    def __init__(self, passes: Passes | PassesAhead | SharedPasses, n_rows: int) -> None:
        self.n_rows, self.widths, self.dtype, self.device = n_rows, passes.widths, passes.dtype, passes.device
        self.passes = passes
        self.generator = torch.Generator().manual_seed(SHUFFLE_SEED)
        self.buffers: dict[str, Tensor] = {}
        """(n_rows, width) by hook, once filled."""
        self.order = torch.empty(0, dtype=torch.long)
        """The places of the buffer in the order of serving; the first `served` of them have been served."""
        self.served = 0
        self.refilled = 0
        """How many of the served places have new rows already: those at which an error has stopped a refill."""
        self.refilling = False
        self.spill = self.new_buffers(0)
        """Rows that have been computed and have no place yet."""

    @property
    def n_buffered(self) -> int:
        return self.n_rows

    def new_buffers(self, n_rows: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros(n_rows, width, dtype=self.dtype, device=self.device)
            for name, width in self.widths.items()
        }

    def take(self, n: int, n_left: int | None = None) -> Taken:
        """Take the next `n` random rows. `n_left`: rows that will still be taken, these included (None: unknown).

        An error (a bad row of the text, say) takes none, and leaves a state from which the same rows come.
        """
        left = math.inf if n_left is None else n_left
        if not self.holds(left):
            self.fill(n)
        first = self.served
        self.served += n
        if isinstance(self.passes, PassesAhead) and not self.holds(left - n):
            try:
                self.passes.begin(self.served - n_rows_of(self.spill))  # to overwrite those that have been served
            except BaseException:
                self.served -= n
                raise
        return self.taken(first, n)

    def sample(self, n: int) -> Taken:
        """Look at up to `n` random rows of the buffer."""
        self.fill()
        return partial(self.rows_at, self.order[:n])

    def taken(self, first: int, n: int) -> Taken:
        """Return the `n` rows from number `first` in the order of serving."""
        return partial(self.rows_at, self.order[first : first + n])

    def rows_at(self, places: Tensor, name: str) -> Tensor:
        return self.buffers[name].index_select(0, to_device(places, self.device))

    def holds(self, n_rows: float) -> bool:
        """Say whether so many rows wait to be served."""
        return bool(self.buffers) and not self.refilling and self.served + n_rows <= self.n_rows

    def fill(self, n_rows: int = 0) -> None:
        """Fill the buffer if it is new; refill its served part if the next `n_rows` would go past the half."""
        self.check_size(n_rows)
        if not self.buffers:
            self.buffers = self.new_buffers(self.n_buffered)
            self.order, self.served, self.refilled = torch.arange(self.n_rows), self.n_rows, 0
            self.refill("filling the buffer")
        elif self.refilling or self.served + n_rows > self.n_rows // 2:
            self.refill("refilling the buffer")

    def refill(self, name: str) -> None:
        """Put new rows into the places that have been served, and draw a new order. After an error it goes on."""
        self.refilling = True
        order, generator = self.next_order()
        self.make_room(order)
        with phase(name, has_bar=True), progress_bar(name, self.served - self.refilled, "rows") as bar:
            while self.refilled < self.served:
                n = self.place(self.order[self.refilled : self.served])
                self.refilled += n
                bar.update(n)
                if self.device.type != "cuda" or self.refilled == self.served:  # a GPU is waited for once, at the end
                    self.passes.check_finite()
        self.order, self.generator = order, generator
        self.served, self.refilled, self.refilling = 0, 0, False

    def next_order(self) -> tuple[Tensor, torch.Generator]:
        """Return the order after the next refill, and the generator as it is then."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return torch.randperm(self.n_rows, generator=generator), generator

    def make_room(self, order: Tensor) -> None:
        """Prepare for new rows, and for serving in this order. Here rows stay until they are overwritten."""

    def place(self, places: Tensor) -> int:
        """Put rows into the first of these places (n,), and return into how many."""
        rows = self.rows_to_place()
        n = min(n_rows_of(rows), len(places))
        slots = to_device(places[:n], self.device)
        for hook, buffer in self.buffers.items():
            buffer.index_copy_(0, slots, rows[hook][:n])
        self.spill = {hook: new[n:] for hook, new in rows.items()}
        return n

    def rows_to_place(self) -> dict[str, Tensor]:
        """Return rows that have no place yet: those left over, or else those of a pass."""
        if n_rows_of(self.spill):
            return self.spill
        for _ in range(MAX_EMPTY_PASSES):
            if n_rows_of(rows := self.passes.next_rows()):
                return rows
        raise no_rows()

    def check_size(self, n: int) -> None:
        """Raise ValueError if `n` rows are more than half the buffer, or if there can never be a pass to fill it."""
        if n > self.n_rows // 2:
            raise ValueError(
                f"train_batch_size: found {n} rows a step, expected at most {self.n_rows // 2}, half the buffer "
                "(n_batches_in_buffer * store_batch_size * context_size / 2); raise n_batches_in_buffer."
            )
        self.passes.check_size()

    def state_dict(self) -> dict[str, Any]:
        state = self.passes.state_dict() | {
            "served": self.served,
            "refilled": self.refilled,
            "order": self.order,
            "spill": self.spill,
            "generator": self.generator.get_state(),
        }
        return state | {"buffers": self.buffers} if self.buffers else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes.load_state_dict(state)
        self.served, self.refilled = state["served"], state.get("refilled", 0)
        self.refilling = self.refilled > 0
        self.order = state["order"].clone()
        self.generator.set_state(state["generator"])
        self.buffers, self.spill = {}, self.new_buffers(0)
        self.load_rows(state)

    def load_rows(self, part: dict[str, Any]) -> None:
        """Take the rows of this buffer from a part of a state: each of several ranks writes those that it holds."""
        spill = {
            name: rows.to(self.device) for name, rows in part["spill"].items() if name in self.widths and len(rows)
        }
        if spill:
            self.passes.check_loaded(spill)  # an error leaves what it was about in the state
        self.spill |= spill
        rows = {name: rows.to(self.device) for name, rows in part.get("buffers", {}).items() if name in self.widths}
        if rows:
            self.passes.check_loaded(rows)
            self.buffers = self.buffers or self.new_buffers(self.n_rows)
        for name, of_hook in rows.items():
            if "places" in part:
                self.buffers[name].index_copy_(0, to_device(part["places"], self.device), of_hook)
            else:  # all of them, in order
                self.buffers[name] = of_hook


def no_rows() -> ValueError:
    """Return the error of rules that exclude everything."""
    return ValueError(
        "exclude_special_tokens, seqpos_slice, max_activation_norm_multiple: found no activation to "
        f"train on in {MAX_EMPTY_PASSES} passes of the language model, expected some; relax one of them."
    )
