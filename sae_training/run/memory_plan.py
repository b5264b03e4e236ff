"""What a run will hold in memory, worked out before it starts, and the refusal of a run that cannot fit.

The plan adds what is held throughout (buffer, weights, optimizer) to the largest of what comes and goes (a pass of the
language model, a step, an evaluation, a checkpoint). What the process holds already is measured; all else follows from
sizes. test_memory_of_a_run.py holds the plan against the peak memory of real runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.fields import Source
from sae_training.config.types import FIXED_K
from sae_training.language_model.sizes import LanguageModelSizes
from sae_training.machine.memory import gigabytes, memory_of, sharers_of
from sae_training.machine.precision import at_least_float32
from sae_training.parallel.division import shape
from sae_training.parallel.ranks import n_ranks
from sae_training.run.evals import prompts_of_width
from sae_training.training.trainer import part_size

# Optimizer state in units of the weights (float32). 8-bit moments have a scale for each 256 of them.
MOMENTS = {"adam": 2.0, "adam8bit": 0.52, "signum": 1.0}

FLOAT = 4  # bytes of a float32, in which training and evaluation compute
PLACE = 8  # bytes a row of the buffer, for its place in the random order (int64)
# And of a shared buffer, during a refill: the next order, who keeps the row and will, and where it is.
PLACE_OF_ALL = 24

# What a step holds at its peak, in tensors of float32, measured on a CPU at d_in 256 and 768.
MATRYOSHKA_PREFIXES = 5
GRADIENTS_AND_ENCODER = 1.25  # of the weights: their gradients, and W_enc once more in 16 bits
# Tensors of (rows, d_in) at the peak of a sparse step: batch, target, reconstruction, gradients, ...
ROWS_OF_A_STEP = 8
ROWS_OF_A_PREFIX = 4  # and for each further prefix of a matryoshka autoencoder
BYTES_OF_AN_ENTRY = 80  # of a sparse code: value, index, gradients, and their sorted copies for the product by latent
# Of a candidate of any rank, in `Shard.among_largest`: its value (float32), as it is gathered and again beside others
# of its row, its number among equal ones (int64), and four masks.
BYTES_OF_A_CANDIDATE = 20
ROWS_OF_A_DENSE_STEP = 9
# Tensors of (rows, d_sae), or entries of the half of it that is active when a run begins. Others: as many as the most.
CODES_OF_A_DENSE_STEP = {"standard": 6, "jumprelu": 9, "gated": 10}

USABLE_SHARE = 0.97  # of what is free; the system needs the rest


class NotEnoughMemory(ValueError):
    """A run would need more memory than the machine has; nothing was started."""


class Kind(Enum):
    """What memory is needed for."""

    BUFFER = "buffer"
    WEIGHTS = "weights"
    OPTIMIZER = "optimizer state"
    AVERAGES = "averages of weights"
    COPY = "a copy of all that is saved"
    PASS = "a pass of the language model"
    STEP = "a training step"
    EVALUATION = "an evaluation"
    CHECKPOINT = "a checkpoint"


SAVED = (Kind.BUFFER, Kind.WEIGHTS, Kind.OPTIMIZER, Kind.AVERAGES)
HELD = (*SAVED, Kind.COPY)  # from the start of a run to its end
OF_THE_LANGUAGE_MODEL = (Kind.BUFFER, Kind.PASS)  # all others grow with the dictionary


@dataclass(frozen=True)
class Part:
    """So many bytes for one kind of thing; `detail` says in a table how many or how large."""

    kind: Kind
    bytes: int
    detail: str = ""

    @property
    def name(self) -> str:
        return self.kind.value + self.detail


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, in bytes, and what there is."""

    parts: tuple[Part, ...]
    in_use: int
    """What the process holds now."""
    available: int
    """What it can still get."""
    lm: int = 0
    """The language model's weights, which are part of what is in use."""
    sharers: int = 1
    """Processes of the machine, of which each has the same share of its memory; `available` is that of one."""
    copies_elsewhere: bool = False
    """Whether a copy of all that is saved has room in other memory: that of the machine, where this is of a GPU."""

    @property
    def has_copy(self) -> bool:
        """Whether checkpoints can be written from a copy, while steps go on."""
        return self.copies_elsewhere or any(part.kind is Kind.COPY for part in self.parts)

    def with_copy(self, folded: int) -> MemoryPlan:
        """Return the plan with a copy of all that is saved, `folded` weights too; without, if it has no room."""
        copy = Part(Kind.COPY, saved_bytes(self.parts) + folded, ", to write checkpoints from")
        longer = dataclasses.replace(self, parts=(*self.parts, copy))
        return longer if longer.needed <= longer.usable else self

    @property
    def held(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.kind in HELD)

    @property
    def passing(self) -> tuple[Part, ...]:
        """The parts that come one after the other, of which only the largest counts."""
        return tuple(part for part in self.parts if part.kind not in HELD)

    @property
    def largest_passing(self) -> Part:
        return max(self.passing, key=lambda part: part.bytes)

    @property
    def needed(self) -> int:
        """What the run needs beyond what the process holds now."""
        return sum(part.bytes for part in self.held) + self.largest_passing.bytes

    @property
    def peak(self) -> int:
        return self.in_use + self.needed

    @property
    def usable(self) -> float:
        return USABLE_SHARE * self.available

    def line(self) -> str:
        of_each = f", the share of each of {self.sharers} processes" if self.sharers > 1 else ""
        return f"Memory: {gigabytes(self.peak)} at most, of {gigabytes(self.in_use + self.available)}{of_each}."

    def table(self) -> str:
        rows = [("now, with the language model", self.in_use, f"({gigabytes(self.lm)} of it its weights)")]
        for part in (*self.held, *self.passing):
            counts = part.kind in HELD or part is self.largest_passing
            rows.append((part.name, part.bytes, "" if counts else "(not at the same time)"))
        of_each = f"(for each of {self.sharers} processes)" if self.sharers > 1 else ""
        rows += [("peak", self.peak, ""), ("the machine has", self.in_use + self.available, of_each)]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"  {name:<{width}}  {gigabytes(n):>10}  {note}".rstrip() for name, n, note in rows)


@dataclass(frozen=True)
class Rows:
    """Rows that a process buffers, and their width at all hooks together; `harvested`: that of a pass."""

    buffered: int
    width: int
    harvested: int
    received: int = 0
    """Rows that come from other processes while a pass is held."""
    places: int = 0
    """Rows of all processes that share a buffer, of which each knows the places; 0: the buffer is not shared."""

    @staticmethod
    def dealt(buffered: int, width: int, n: int, per_pass: int) -> Rows:
        """Return those of one of `n` ranks that keep `buffered` rows together: a pass is sent, and as much comes in."""
        return Rows(math.ceil(buffered / n), width, width, 2 * per_pass, buffered)


def plan_memory(
    cfg: LanguageModelSAERunnerConfig, singles: Iterable[LanguageModelSAERunnerConfig], store: ActivationsStore
) -> MemoryPlan:
    """Return the plan of a run of `singles` whose process has loaded the language model and nothing else."""
    width = sum(site.d_in for site in store.sites.all)
    buffer = Rows(store.n_buffered, width, width)
    if store.deal is not None and store.n_buffered:
        buffer = Rows.dealt(cfg.buffer_rows, width, store.deal.n, cfg.store_batch_size * cfg.context_size)
    ahead = store.device.type == "cuda" and n_ranks() == 1
    mesh = shape(cfg.parallel, cfg.mesh)
    singles = list(singles)
    parts = parts_of(cfg, singles, buffer, store.model.cfg, ahead, mesh=mesh)
    in_use, available = memory_of(store.device)
    lm = sum(parameter.numel() * parameter.element_size() for parameter in store.model.parameters())
    plan = MemoryPlan(parts, in_use, available, lm, sharers_of(store.device))
    if not saves_from_a_copy(cfg, n_ranks()):
        return plan
    folded = folded_bytes(cfg, singles)
    if store.device.type == "cpu":
        return plan.with_copy(folded)
    _, free = memory_of(torch.device("cpu"))
    return dataclasses.replace(plan, copies_elsewhere=saved_bytes(parts) + folded <= USABLE_SHARE * free)


def saves_from_a_copy(cfg: LanguageModelSAERunnerConfig, n: int) -> bool:
    """Return whether one of `n` processes writes checkpoints from a copy, if there is room for it.

    Several write together, and tell each other how far they are, which would mix with what their steps tell.
    """
    return n == 1 and (cfg.checkpoint_every_minutes is not None or cfg.checkpoint_every_steps is not None)


def folded_bytes(cfg: LanguageModelSAERunnerConfig, singles: Iterable[LanguageModelSAERunnerConfig]) -> int:
    """Return the bytes of the weights with scales folded in, which a checkpoint has beside those in training."""
    return sum(map(weight_bytes, singles)) if cfg.normalize_activations == "expected_average_only_in" else 0


def saved_bytes(parts: Iterable[Part]) -> int:
    return sum(part.bytes for part in parts if part.kind in SAVED)


def parts_of(
    cfg: LanguageModelSAERunnerConfig,
    singles: list[LanguageModelSAERunnerConfig],
    rows: Rows,
    lm: LanguageModelSizes,
    on_gpu: bool,
    dense: bool = False,
    mesh: tuple[int, int] = (1, 1),
) -> tuple[Part, ...]:
    """Return what a process that trains `singles` holds beside the language model; their widths are known.

    The `cfg` of a loaded model has the sizes that are asked for here under the same names. `dense`: steps are computed
    the dense way, whatever the architecture. `mesh`: groups that share the rows, ranks of a group that share latents.
    """
    weights = [weight_bytes(single) for single in singles]
    # Where training scales its batches, what is evaluated and saved are copies with the scales folded in.
    folded = folded_bytes(cfg, singles)
    evaluation = 0 if cfg.eval_every == 0 else evaluation_bytes(cfg, singles, rows.width, lm) + folded
    parts = [
        Part(Kind.WEIGHTS, sum(weights), f" of {len(singles)} autoencoders, {each_of(weights)}" * (len(singles) > 1)),
        Part(Kind.OPTIMIZER, int(MOMENTS[cfg.optimizer] * sum(weights))),
        Part(Kind.STEP, max(step_bytes(single, n, mesh, dense) for single, n in zip(singles, weights, strict=True))),
        Part(Kind.EVALUATION, evaluation),
        Part(Kind.CHECKPOINT, max(weights) // 2 + folded),  # one tensor at a time is copied into order
    ]
    if cfg.ema_decay is not None:
        parts.append(Part(Kind.AVERAGES, sum(weights)))
    if rows.buffered:
        detail = f", {rows.buffered:,} rows x {rows.width:,}"
        buffer = Part(Kind.BUFFER, buffer_bytes(rows, lm.dtype.itemsize, on_gpu), detail)
        parts = [buffer, Part(Kind.PASS, pass_bytes(cfg, rows, lm)), *parts]
    return tuple(parts)


# ------------------------------------------------------------------------------------------------- refusal and advice


def check_memory(plan: MemoryPlan, cfg: LanguageModelSAERunnerConfig, n_saes: int) -> None:
    """Raise NotEnoughMemory, with the table and the most useful things to change, if the plan does not fit."""
    if plan.needed <= plan.usable:
        return
    largest = max(plan.parts, key=lambda part: part.bytes)
    raise NotEnoughMemory(
        f"memory: this run needs {gigabytes(plan.needed)} more, but {gigabytes(plan.available)} are free:\n"
        f"{plan.table()}\nThe largest part is {largest.name}: {advice(plan, cfg, largest, n_saes)}."
    )


def advice(plan: MemoryPlan, cfg: LanguageModelSAERunnerConfig, largest: Part, n_saes: int) -> str:
    """Return what to change, with about the value that would fit if nothing else is changed, where that can be told."""
    match largest.kind:
        case Kind.BUFFER:
            return f"lower n_batches_in_buffer {lowered(plan, [largest], cfg.n_batches_in_buffer)}"
        case Kind.PASS:
            return f"lower store_batch_size (now {cfg.store_batch_size})"
        case Kind.STEP:
            also = f", or set micro_batch_size lower (now {cfg.micro_batch_size or cfg.train_batch_size})"
        case Kind.EVALUATION:
            also = ", or set eval_every_steps=0"
        case Kind.CHECKPOINT | Kind.COPY:
            also = ""
        case Kind.WEIGHTS | Kind.OPTIMIZER | Kind.AVERAGES:
            also = in_8_bits(plan, cfg)
    grows = [part for part in (*plan.held, plan.largest_passing) if part.kind not in OF_THE_LANGUAGE_MODEL]
    fewer = "train fewer autoencoders at once, or " if n_saes > 1 else ""
    return f"{fewer}lower expansion_factor {lowered(plan, grows, cfg.expansion_factor)}{also}"


def in_8_bits(plan: MemoryPlan, cfg: LanguageModelSAERunnerConfig) -> str:
    """Return the advice to keep Adam's moments in 8 bits; "" where they are, or where resampling rules it out."""
    if cfg.optimizer != "adam" or cfg.feature_sampling_method is not None:
        return ""
    state = sum(part.bytes for part in plan.parts if part.kind is Kind.OPTIMIZER)
    fits = plan.needed - state * (1 - MOMENTS["adam8bit"] / MOMENTS["adam"]) <= plan.usable
    enough = "" if fits else ", which by itself is not enough"
    return f', or set optimizer="adam8bit" (a quarter of the optimizer\'s memory{enough})'


def lowered(plan: MemoryPlan, parts: Iterable[Part], value: Any) -> str:
    """Return (now ...) to the value that leaves room for `parts`, which grow with it."""
    size = sum(part.bytes for part in parts)
    room = plan.usable - (plan.needed - size)
    fits = [int(number * room / size) for number in (value if isinstance(value, list) else [value])]
    return f"(now {value}) to about {max(fits)}" if max(fits) > 0 else f"(now {value}; the rest does not fit either)"


# --------------------------------------------------------------------------------------------------------- the parts


def sizes(cfg: LanguageModelSAERunnerConfig) -> tuple[int, int]:
    """The width of the activations, and how many latents this process holds."""
    assert cfg.d_in is not None and cfg.d_sae is not None
    return cfg.d_in, cfg.d_sae // shape(cfg.parallel, cfg.mesh)[1]


def weight_bytes(cfg: LanguageModelSAERunnerConfig) -> int:
    d_in, d_sae = sizes(cfg)
    d_out = cfg.d_out or d_in
    skip = d_in * d_out if cfg.skip_connection else 0
    return (d_sae * (d_in + d_out + 2) + d_out + skip) * at_least_float32(cfg.dtype).itemsize


def each_of(weights: list[int]) -> str:
    low, high = min(weights), max(weights)
    return f"{gigabytes(low)} each" if low == high else f"{gigabytes(low)} to {gigabytes(high)}"


def buffer_bytes(rows: Rows, itemsize: int, on_gpu: bool) -> int:
    """Rows in the language model's precision; one process on a GPU computes half of them once more, ahead."""
    of_rows = rows.buffered * rows.width * itemsize
    return int((1.5 if on_gpu else 1) * of_rows) + PLACE * rows.buffered + PLACE_OF_ALL * rows.places


def rows_at_once(cfg: LanguageModelSAERunnerConfig, groups: int) -> int:
    """Return how many rows a process computes at once: of a batch or a part of it, those that one of `groups` gets."""
    return math.ceil(min(part_size(cfg), cfg.tokens_per_step) / groups)


def chooses_by_batch(cfg: LanguageModelSAERunnerConfig) -> bool:
    """Return whether the k * rows largest of a whole batch are active, and not the k largest of each row."""
    is_matryoshka = cfg.architecture == "matryoshka" and cfg.matryoshka_selection == "batchtopk"
    return cfg.architecture == "batchtopk" or is_matryoshka


def candidate_bytes(cfg: LanguageModelSAERunnerConfig, rows: int, of_group: int) -> int:
    """Return what a choice by row holds where ranks share latents: the candidates of all of them, k of each row."""
    if of_group == 1 or cfg.architecture not in FIXED_K or chooses_by_batch(cfg):
        return 0
    return of_group * rows * min(cfg.k, sizes(cfg)[1]) * BYTES_OF_A_CANDIDATE


def step_bytes(cfg: LanguageModelSAERunnerConfig, weights: int, mesh: tuple[int, int], dense: bool = False) -> int:
    """Gradients, tensors of rows, candidates, and the code: sparse where k latents are chosen, else dense."""
    d_in, d_sae = sizes(cfg)
    if cfg.dtype.itemsize < FLOAT:
        weights *= 2  # because there are copies of the weights and of their gradients, at half the size
    rows = rows_at_once(cfg, mesh[0])
    candidates = candidate_bytes(cfg, rows, mesh[1])
    if dense or cfg.architecture not in FIXED_K:
        codes = CODES_OF_A_DENSE_STEP.get(cfg.architecture, max(CODES_OF_A_DENSE_STEP.values()))
        return weights + candidates + (ROWS_OF_A_DENSE_STEP * d_in + codes * d_sae) * rows * FLOAT
    prefixes = MATRYOSHKA_PREFIXES if cfg.architecture == "matryoshka" else 1
    tensors = (ROWS_OF_A_STEP + ROWS_OF_A_PREFIX * (prefixes - 1)) * d_in * FLOAT
    of_rows = rows * (tensors + BYTES_OF_AN_ENTRY * cfg.k * prefixes)
    return int(GRADIENTS_AND_ENCODER * weights) + of_rows + candidates


def pass_bytes(cfg: Source, rows: Rows, lm: LanguageModelSizes) -> int:
    """What a pass harvests, twice while it is copied into the buffer, and what one block computes with."""
    tokens = cfg.store_batch_size * cfg.context_size
    block = tokens * (3 * lm.d_mlp + 8 * lm.d_model + 3 * lm.n_heads * cfg.context_size)
    return (2 * tokens * rows.harvested + rows.received * rows.width + block) * lm.dtype.itemsize


def evaluation_bytes(
    cfg: LanguageModelSAERunnerConfig, singles: list[LanguageModelSAERunnerConfig], width: int, lm: LanguageModelSizes
) -> int:
    """Clean and changed logits, five tensors of one prompt's distributions, all activations, and the largest codes."""
    widest = max(sizes(single)[1] for single in singles)
    n_held_out = max(1, cfg.n_eval_batches * cfg.store_batch_size)
    tokens = min(prompts_of_width(cfg.context_size, max(lm.d_vocab, widest)), n_held_out) * cfg.context_size
    logits = 2 * tokens * lm.d_vocab * lm.dtype.itemsize
    distributions = 5 * cfg.context_size * lm.d_vocab * FLOAT
    codes = max(code_bytes(single, tokens) for single in singles)
    return logits + distributions + codes + tokens * width * FLOAT


def code_bytes(cfg: LanguageModelSAERunnerConfig, tokens: int) -> int:
    """Return the bytes of an evaluation's dense codes: pre-activations, activations, and the mask that counts them.

    With a fixed k there is one more, for the choice, and W_enc in 16 bits.
    """
    d_in, d_sae = sizes(cfg)
    if cfg.architecture not in FIXED_K:
        return 3 * tokens * d_sae * FLOAT
    return 4 * tokens * d_sae * FLOAT + 2 * d_in * d_sae
