"""The shuffle buffer of processes that train the same autoencoders: each keeps its share of the rows.

Places, order and refills are those of `ShuffleBuffer` alone, so all processes know where every row is. A new row goes
from the rank that made its pass to the one that will keep it (`Deal`). After each refill the order is another, so the
rows that have not been served are dealt out again. Where ranks compute the same rows, each gets them from those that
keep them as they are served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store.passes import Passes, to_device
from sae_training.activations_store.shared_passes import Round, make_round
from sae_training.activations_store.shuffle_buffer import MAX_EMPTY_PASSES, ShuffleBuffer, no_rows
from sae_training.activations_store.source import Taken
from sae_training.parallel.deal import Deal
from sae_training.parallel.ranks import exchanged, n_ranks

MOVED_AT_ONCE = 65_536  # rows of all ranks: what is on its way is held twice


class DealtBuffer(ShuffleBuffer):
    """`n_rows` rows of `passes` at each hook, of which this process keeps those that `deal` gives it."""

    def __init__(self, passes: Passes, n_rows: int, deal: Deal) -> None:
        self.deal = deal
        self.kept = int((deal.keeper(torch.arange(n_rows)) == deal.rank).sum())
        """How many rows are kept here."""
        super().__init__(passes, n_rows)
        self.passes: Passes = passes
        self.forget()

    @property
    def n_buffered(self) -> int:
        return self.kept

    def forget(self) -> None:
        """Keep nothing."""
        self.keeper = torch.full((self.n_rows,), -1, dtype=torch.int16)
        """The rank that keeps the row of each place."""
        self.next_keeper = self.keeper
        """The rank that will, once the refill that is under way is done."""
        self.slots = torch.full((self.n_rows,), -1, dtype=torch.int32)
        """Where that row is in `buffers`; -1: not here."""
        self.free = torch.arange(self.kept, dtype=torch.int32)
        """Where in `buffers` no row is."""
        self.round: Round | None = None
        """Passes whose rows are being placed."""
        self.placed = 0
        """How many rows of the round have places."""

    # --------------------------------------------------------------------------------------------------------- serving

    def taken(self, first: int, n: int) -> Taken:
        if first % self.deal.batch or n != self.deal.batch:
            raise ValueError(f"rows: found {n} rows from number {first}, expected a batch of {self.deal.batch} rows.")
        own = self.deal.computed(torch.arange(first, first + n))
        return partial(self.rows_for, self.deal.ranks_of_group, self.order[own])

    def sample(self, n: int) -> Taken:
        """Look at up to `n` random rows of the buffer. All processes must ask for their hooks in the same order."""
        self.fill()
        return partial(self.rows_for, range(n_ranks()), self.order[:n])

    def rows_for(self, ranks: Sequence[int], places: Tensor, name: str) -> Tensor:
        """Return the rows at `places` (n,), which only these ranks keep, on each of them."""
        keeper = self.keeper[places]
        kept = {rank: (keeper == rank).nonzero().flatten() for rank in ranks}
        own = self.buffers[name].index_select(0, self.at(places[kept[self.deal.rank]]))
        if len(ranks) == 1:
            return own
        to_each, from_each = nothing(), nothing()
        for rank, numbers in kept.items():
            to_each[rank].append(own)
            from_each[rank].append(own if rank == self.deal.rank else own.new_empty(len(numbers), own.shape[1]))
        exchanged(to_each, from_each)
        rows = own.new_empty(len(places), own.shape[1])
        for rank, numbers in kept.items():
            rows.index_copy_(0, to_device(numbers, self.device), from_each[rank][0])
        return rows

    # --------------------------------------------------------------------------------------------------------- filling

    def make_room(self, order: Tensor) -> None:
        """Forget the rows that have been served, and deal out the others anew, as their new order has it."""
        self.next_keeper = self.keepers(order)
        self.release(self.order[self.refilled : self.served])
        waiting = self.order[self.served :]
        for places in waiting[self.keeper[waiting] != self.next_keeper[waiting]].split(MOVED_AT_ONCE):
            self.receive(places, self.keeper[places], partial(self.given_away, places))

    def keepers(self, order: Tensor) -> Tensor:
        """Return the rank that keeps the row of each place while rows are served in this order."""
        keeper = torch.empty_like(self.keeper)
        keeper[order] = self.deal.keeper(torch.arange(self.n_rows)).to(keeper.dtype)
        return keeper

    def round_to_place(self) -> Round:
        """Return the round whose rows are to be placed next: the one begun, or a new one."""
        for _ in range(MAX_EMPTY_PASSES):
            if self.round is not None and self.placed < self.round.n_rows:
                return self.round
            self.round, self.placed = make_round(self.passes), 0
        raise no_rows()

    def place(self, places: Tensor) -> int:
        """Send the next rows of a round to the ranks that will keep the first of these places; return how many."""
        made = self.round_to_place()
        places = places[: made.n_rows - self.placed]
        rows = torch.arange(self.placed, self.placed + len(places))
        firsts = torch.tensor(made.firsts)
        maker = torch.searchsorted(firsts + torch.tensor(made.sizes), rows, right=True)

        def made_here(numbers: Tensor) -> dict[str, Tensor]:
            own = to_device(rows[numbers] - firsts[self.deal.rank], self.device)
            return {name: made.own[name].index_select(0, own) for name in self.widths}

        self.receive(places, maker, made_here)
        self.placed += len(places)
        return len(places)

    def given_away(self, places: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Return the rows at these of the `places`, which are then no longer kept here."""
        slots = self.at(places[numbers])
        rows = {name: buffer.index_select(0, slots) for name, buffer in self.buffers.items()}
        self.release(places[numbers])
        return rows

    def receive(self, places: Tensor, source: Tensor, rows: Callable[[Tensor], dict[str, Tensor]]) -> None:
        """Move the row of each of `places` (n,) from the rank `source` (n,) to the one that will keep it.

        `rows` returns those of which this rank is the source, by their numbers among the places.
        """
        here, target, to_each, from_each = self.deal.rank, self.next_keeper[places], nothing(), nothing()
        for rank in range(n_ranks()):
            to_each[rank] = [*rows(((source == here) & (target == rank)).nonzero().flatten()).values()]
        coming = [((source == rank) & (target == here)).nonzero().flatten() for rank in range(n_ranks())]
        for rank, numbers in enumerate(coming):
            empty = [torch.empty(len(numbers), w, dtype=self.dtype, device=self.device) for w in self.widths.values()]
            from_each[rank] = to_each[here] if rank == here else empty
        exchanged(to_each, from_each)
        for numbers, of_hooks in zip(coming, from_each, strict=True):
            self.keep(places[numbers], dict(zip(self.widths, of_hooks, strict=True)))
        self.keeper[places] = target

    def keep(self, places: Tensor, rows: dict[str, Tensor]) -> None:
        """Put rows (n, width) into free slots, as those of `places` (n,)."""
        slots, self.free = self.free[: len(places)], self.free[len(places) :]
        self.slots[places] = slots
        for name, of_hook in rows.items():
            self.buffers[name].index_copy_(0, self.at(places), of_hook)

    def at(self, places: Tensor) -> Tensor:
        """Return where in `buffers` the rows of these places (n,) are, on its device."""
        return to_device(self.slots[places].long(), self.device)

    def release(self, places: Tensor) -> None:
        """Forget the rows of those of `places` (n,) that are kept here."""
        slots = self.slots[places]
        self.free = torch.cat([self.free, slots[slots >= 0]])
        self.slots[places] = -1

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        places = (self.slots >= 0).nonzero().flatten()
        places = places[self.slots[places].argsort()]
        state = super().state_dict()
        if self.buffers and len(places) < self.kept:  # an error has stopped a refill
            slots = self.at(places)
            state["buffers"] = {name: buffer.index_select(0, slots) for name, buffer in self.buffers.items()}
        return state | self.state_of_passes() | {"places": places}

    def state_of_passes(self) -> dict[str, Any]:
        """Return the state before the first pass of which no row has a place, and what is left here of that before."""
        made, spill = self.round, self.new_buffers(0)
        for number, first in enumerate(made.firsts if made is not None else ()):
            assert made is not None
            if first + made.sizes[number] <= self.placed:
                continue
            if first >= self.placed and not (made.is_rest and number == 0):
                return made.states[number] | {"spill": spill}
            if number == self.deal.rank:
                spill = {name: made.own[name][self.placed - first :] for name in self.widths}
            return made.states[number + 1] | {"spill": spill}
        return self.passes.state_dict() | {"spill": spill}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forget()
        super().load_state_dict(state)

    def load_rows(self, part: dict[str, Any]) -> None:
        self.load_spill({name: rows for name, rows in part["spill"].items() if name in self.widths and len(rows)})
        held = {name: rows for name, rows in part.get("buffers", {}).items() if name in self.widths}
        if not held:
            return
        if not self.buffers:
            self.buffers = self.new_buffers(self.kept)
            self.keeper = self.keepers(self.next_order()[0] if self.refilling else self.order)
        is_wanted = self.keeper == self.deal.rank
        is_wanted[self.order[self.refilled : self.served]] &= not self.refilling
        places = part.get("places", torch.arange(self.n_rows))
        numbers = is_wanted[places].nonzero().flatten()
        rows = {name: of_hook[numbers].to(self.device) for name, of_hook in held.items()}
        self.passes.check_loaded(rows)
        known = self.slots[places[numbers]] >= 0  # by the rows of another hook, in another part
        self.keep(places[numbers[~known]], {})
        slots = self.at(places[numbers])
        for name, of_hook in rows.items():
            self.buffers[name].index_copy_(0, slots, of_hook)

    def load_spill(self, spill: dict[str, Tensor]) -> None:
        """Take rows that have no place yet as a pass of the first rank."""
        if not spill:
            return
        of_text = self.passes.state_dict()
        own = self.round.own if self.round is not None else self.new_buffers(0)
        if self.deal.rank == 0:
            own |= {name: rows.to(self.device) for name, rows in spill.items()}
        n = len(next(iter(spill.values())))
        self.round = Round([of_text] * (n_ranks() + 1), [n] + [0] * (n_ranks() - 1), own, is_rest=True)


def nothing() -> list[list[Tensor]]:
    """Return no tensor for each rank."""
    return [[] for _ in range(n_ranks())]
