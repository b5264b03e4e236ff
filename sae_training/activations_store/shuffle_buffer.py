"""The shuffling buffer: rows come in in the order of the text, and go out in a random one.

The buffer is allocated once. Batches are drawn from it in a random order; when half of its rows have been served,
exactly those rows are overwritten in place by new ones, and a new order is drawn. A row waits in the buffer for two
refills on average, so each batch mixes tokens of many prompts. Rows keep the language model's own precision, hence
lose nothing. Near the end of a run, when the rows that wait are all that it will still ask for, none are computed any
more: half a buffer of passes whose rows nobody would have seen.

There is a buffer for each site (hook), all served in the same order: row i is the same token at every site. The order
depends on nothing but their size, so an autoencoder gets the same batches whichever others are trained beside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store.passes import Passes, PassesAhead, to_device

SHUFFLE_SEED = 42  # the same in all runs, so that seeds of one run can share their batches
MAX_EMPTY_PASSES = 20  # in a row, after which nothing is expected to come


class ShuffleBuffer:
    """`n_rows` rows of each site of `passes`, in the model's precision; empty until they are asked for."""

    def __init__(self, passes: Passes, n_rows: int) -> None:
        self.n_rows, self.device = n_rows, passes.device
        self.dtype: torch.dtype = passes.model.cfg.dtype
        self.widths = [site.d_in for site in passes.sites]
        self.names = [site.name for site in passes.sites]
        self.passes: Passes | PassesAhead = PassesAhead(passes) if self.device.type == "cuda" else passes
        self.generator = torch.Generator().manual_seed(SHUFFLE_SEED)
        self.buffers: list[Tensor] = []
        """One (n_rows, width) for each site, once they are filled."""
        self.order = torch.empty(0, dtype=torch.long)
        self.served = 0
        self.places = torch.empty(0, dtype=torch.long)
        """Where the latest batch is."""
        self.spill = [torch.empty(0, width, dtype=self.dtype, device=self.device) for width in self.widths]
        """Rows that have been computed and have no place yet."""

    def advance(self, n_rows: int, n_left: int | None = None) -> None:
        """Go on to the next `n_rows` random rows; of `n_left` that will be asked for, these included (None: many)."""
        left = math.inf if n_left is None else n_left
        if not self.holds(left):
            self.fill(n_rows)
        self.places = self.order[self.served : self.served + n_rows]
        self.served += n_rows
        if isinstance(self.passes, PassesAhead) and not self.holds(left - n_rows):
            self.passes.begin(self.served - len(self.spill[0]))  # in the place of those that have been served

    def holds(self, n_rows: float) -> bool:
        """Whether so many rows wait to be served."""
        return bool(self.buffers) and self.served + n_rows <= self.n_rows

    def rows(self, site: int) -> Tensor:
        """The latest batch (n, width) at the site of this number."""
        return self.rows_at(self.places, site)

    def rows_at(self, places: Tensor, site: int) -> Tensor:
        return self.buffers[site].index_select(0, to_device(places, self.device))

    def fill(self, n_rows: int = 0) -> None:
        """Allocate and fill the buffers at first, and refill their served half when the next `n_rows` would pass it."""
        self.check_size(n_rows)
        if not self.buffers:
            self.buffers = [torch.empty(self.n_rows, w, dtype=self.dtype, device=self.device) for w in self.widths]
            self.overwrite(torch.arange(self.n_rows))
        elif self.served + n_rows > self.n_rows // 2:
            self.overwrite(self.order[: self.served])

    def overwrite(self, slots: Tensor) -> None:
        """Put new rows into the places `slots` (n,), and draw a new order."""
        slots = to_device(slots, self.device)
        first_fill, n_empty = len(slots) == self.n_rows, 0
        with tqdm(total=len(slots), desc="filling the buffer", unit="row", leave=False, disable=not first_fill) as bar:
            while len(slots):
                rows = self.spill if len(self.spill[0]) else self.passes.next_rows()
                n = min(len(rows[0]), len(slots))
                n_empty = 0 if n else n_empty + 1
                if n_empty == MAX_EMPTY_PASSES:
                    raise ValueError(
                        f"exclude_special_tokens, seqpos_slice, max_activation_norm_multiple: of {n_empty} passes of "
                        "the language model they leave no activation to train on; relax one of them."
                    )
                for buffer, new in zip(self.buffers, rows, strict=True):
                    buffer.index_copy_(0, slots[:n], new[:n])
                self.spill, slots = [new[n:] for new in rows], slots[n:]
                bar.update(n)
        self.order = torch.randperm(self.n_rows, generator=self.generator)
        self.served = 0

    def check_size(self, n_rows: int) -> None:
        if n_rows > self.n_rows // 2:
            raise ValueError(
                f"train_batch_size: {n_rows} rows a step, but half the buffer holds {self.n_rows // 2} "
                "(n_batches_in_buffer * store_batch_size * context_size / 2); raise n_batches_in_buffer."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: buffers, order, position in it, generator, and the passes' state."""
        state = self.passes.state_dict() | {
            "served": self.served,
            "order": self.order,
            "spill": dict(zip(self.names, self.spill, strict=True)),
            "generator": self.generator.get_state(),
        }
        return state | {"buffers": dict(zip(self.names, self.buffers, strict=True))} if self.buffers else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes.load_state_dict(state)
        self.served = state["served"]
        self.order = state["order"].clone()
        self.spill = [state["spill"][name].to(self.device) for name in self.names]
        self.generator.set_state(state["generator"])
        if "buffers" in state:
            self.buffers = [state["buffers"][name].to(self.device) for name in self.names]
