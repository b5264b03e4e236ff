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

    def __init__(self, passes: Passes | SharedPasses, n_rows: int) -> None:
        self.n_buffered, self.widths, self.dtype, self.device = n_rows, passes.widths, passes.dtype, passes.device
        ahead = self.device.type == "cuda" and isinstance(passes, Passes)
        self.passes: Passes | PassesAhead | SharedPasses = PassesAhead(passes) if ahead else passes  # pyright: ignore
        self.generator = torch.Generator().manual_seed(SHUFFLE_SEED)
        self.buffers: dict[str, Tensor] = {}
        """(n_rows, width) by hook, once filled."""
        self.order = torch.empty(0, dtype=torch.long)
        """The places of the buffer in the order of serving; the first `served` of them have been served."""
        self.served = 0
        self.spill = self.new_buffers(0)
        """Rows that have been computed and have no place yet."""

    def new_buffers(self, n_rows: int) -> dict[str, Tensor]:
        return {
            name: torch.empty(n_rows, width, dtype=self.dtype, device=self.device)
            for name, width in self.widths.items()
        }

    def take(self, n: int, n_left: int | None = None) -> Taken:
        """Take the next `n` random rows. `n_left`: rows that will still be taken, these included (None: unknown).

        An error (a bad row of the text, say) takes none, and leaves a state from which the same rows come.
        """
        left = math.inf if n_left is None else n_left
        if not self.holds(left):
            self.fill(n)
        places = self.order[self.served : self.served + n]
        self.served += n
        if isinstance(self.passes, PassesAhead) and not self.holds(left - n):
            try:
                self.passes.begin(self.served - n_rows_of(self.spill))  # to overwrite those that have been served
            except BaseException:
                self.served -= n
                raise
        return partial(self.rows_at, places)

    def sample(self, n: int) -> Taken:
        """Look at up to `n` random rows of the buffer."""
        self.fill()
        return partial(self.rows_at, self.order[:n])

    def rows_at(self, places: Tensor, name: str) -> Tensor:
        return self.buffers[name].index_select(0, to_device(places, self.device))

    def holds(self, n_rows: float) -> bool:
        """Say whether so many rows wait to be served."""
        return bool(self.buffers) and self.served + n_rows <= self.n_buffered

    def fill(self, n_rows: int = 0) -> None:
        """Fill the buffer if it is new; refill its served part if the next `n_rows` would go past the half."""
        self.check_size(n_rows)
        if not self.buffers:
            self.buffers = self.new_buffers(self.n_buffered)
            self.overwrite(torch.arange(self.n_buffered))
        elif self.served + n_rows > self.n_buffered // 2:
            self.overwrite(self.order[: self.served])

    def overwrite(self, slots: Tensor) -> None:
        """Put new rows into the places `slots` (n,), and draw a new order."""
        slots = to_device(slots, self.device)
        first_fill, n_written = len(slots) == self.n_buffered, 0
        name = "filling the buffer" if first_fill else "refilling the buffer"
        with phase(name, has_bar=True), progress_bar(name, len(slots), "rows") as bar:
            try:
                while n_written < len(slots):
                    rows = self.rows_to_place()
                    n = min(n_rows_of(rows), len(slots) - n_written)
                    for name, buffer in self.buffers.items():
                        buffer.index_copy_(0, slots[n_written : n_written + n], rows[name][:n])
                    self.spill = {name: new[n:] for name, new in rows.items()}
                    n_written += n
                    bar.update(n)
                    if self.device.type != "cuda" or n_written == len(slots):  # a GPU is waited for once, at the end
                        self.passes.check_finite()
            except BaseException:
                # The next fill places the rows once more, in the same order.
                self.spill = {
                    name: torch.cat([buffer.index_select(0, slots[:n_written]), self.spill[name]])
                    for name, buffer in self.buffers.items()
                }
                self.buffers = {} if first_fill else self.buffers
                raise
        self.order = torch.randperm(self.n_buffered, generator=self.generator)
        self.served = 0

    def rows_to_place(self) -> dict[str, Tensor]:
        """Return rows that have no place yet: those left over, or else those of a pass."""
        if n_rows_of(self.spill):
            return self.spill
        for _ in range(MAX_EMPTY_PASSES):
            if n_rows_of(rows := self.passes.next_rows()):
                return rows
        raise ValueError(
            "exclude_special_tokens, seqpos_slice, max_activation_norm_multiple: found no activation to "
            f"train on in {MAX_EMPTY_PASSES} passes of the language model, expected some; relax one of them."
        )

    def check_size(self, n: int) -> None:
        """Raise ValueError if `n` rows are more than half the buffer, or if there can never be a pass to fill it."""
        if n > self.n_buffered // 2:
            raise ValueError(
                f"train_batch_size: found {n} rows a step, expected at most {self.n_buffered // 2}, half the buffer "
                "(n_batches_in_buffer * store_batch_size * context_size / 2); raise n_batches_in_buffer."
            )
        self.passes.check_size()

    def state_dict(self) -> dict[str, Any]:
        state = self.passes.state_dict() | {
            "served": self.served,
            "order": self.order,
            "spill": self.spill,
            "generator": self.generator.get_state(),
        }
        return state | {"buffers": self.buffers} if self.buffers else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes.load_state_dict(state)
        self.served = state["served"]
        self.order = state["order"].clone()
        self.generator.set_state(state["generator"])
        self.spill = {name: state["spill"][name].to(self.device) for name in self.widths}
        if "buffers" in state:
            self.buffers = {name: state["buffers"][name].to(self.device) for name in self.widths}
        for rows in (self.spill, self.buffers):  # an error leaves what it was about in the state
            if rows:
                self.passes.check_loaded(rows)
