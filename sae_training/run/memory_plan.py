"""What a run will hold in memory, worked out before it starts, and the refusal of one that cannot fit.

A table of what is held throughout (language model, buffers, each autoencoder's weights and optimizer) and of what
comes and goes (a pass of the language model, a step, an evaluation, a checkpoint), of which only the largest counts.
What the process holds already is measured; all else follows from sizes, within a tenth of what runs were seen to hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import FIXED_K
from sae_training.machine.memory import gigabytes, memory_of
from sae_training.run.evals import prompts_of_a_pass

MOMENTS = {"adam": 2.0, "adam8bit": 0.52, "signum": 1.0}

"""Optimizer state, in units of the weights (float32); 8-bit moments have a scale for each 256 of them."""

GIVEN_UP_SHARE = 0.97  # of what is free: the last few per cent are the system's


class NotEnoughMemory(ValueError):
    """A run would need more memory than the machine has; nothing was started."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what needs them."""

    held: dict[str, int]
    """From the start of the run to its end."""
    passing: dict[str, int]
    """One after the other."""
    in_use: int
    """By the process now."""
    available: int
    """To the process, beyond what it has."""
    lm: int = 0
    """Of what is in use, the language model's weights."""

    @property
    def needed(self) -> int:
        """Beyond what is in use now."""
        return sum(self.held.values()) + max(self.passing.values())

    @property
    def peak(self) -> int:
        return self.in_use + self.needed

    def line(self) -> str:
        return f"Memory: {gigabytes(self.peak)} at most, of {gigabytes(self.in_use + self.available)}."

    def table(self) -> str:
        largest = max(self.passing, key=lambda name: self.passing[name])
        rows = [("now, with the language model", self.in_use, f"({gigabytes(self.lm)} of it its weights)")]
        rows += [(name, n, "") for name, n in self.held.items()]
        rows += [(name, n, "" if name == largest else "(not at the same time)") for name, n in self.passing.items()]
        rows += [("peak", self.peak, ""), ("the machine has", self.in_use + self.available, "")]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"  {name:<{width}}  {gigabytes(n):>10}  {note}".rstrip() for name, n, note in rows)


def plan_memory(
    cfg: LanguageModelSAERunnerConfig, singles: Iterable[LanguageModelSAERunnerConfig], store: ActivationsStore
) -> MemoryPlan:
    """The plan of a run of `singles` that has loaded its language model and nothing else."""
    singles = list(singles)
    weights = [weight_bytes(single) for single in singles]
    lm_bytes = store.model.cfg.dtype.itemsize
    width = sum(site.d_in for site in store.hooks)
    several = len(singles) > 1
    held = {
        f"weights of {len(singles)} autoencoders, {each_of(weights)}" if several else "weights": sum(weights),
        "their optimizers" if several else "optimizer": int(MOMENTS[cfg.optimizer] * sum(weights)),
    }
    if cfg.ema_decay is not None:
        held["averages of weights"] = sum(weights)
    if store.needs_buffer:
        ahead = 0.5 if store.device.type == "cuda" else 0  # what is computed while the buffer's first half is served
        row_bytes = width * lm_bytes + 8
        held = {f"buffer, {store.n_rows:,} rows x {width:,}": int((1 + ahead) * store.n_rows * row_bytes), **held}
    # Where training scales its batches, what is evaluated and saved are copies with the scales folded in.
    folded = sum(weights) if cfg.normalize_activations == "expected_average_only_in" else 0
    passing = {
        "a pass of the language model": pass_bytes(cfg, store, width) if store.needs_buffer else 0,
        "a training step": max(step_bytes(single, n) for single, n in zip(singles, weights, strict=True)),
        "an evaluation": 0 if cfg.eval_every == 0 else evaluation_bytes(cfg, singles, store, width) + folded,
        "a checkpoint": max(weights) // 2 + folded,  # one tensor at a time is laid out in order
    }
    in_use, available = memory_of(store.device)
    lm = sum(parameter.numel() * parameter.element_size() for parameter in store.model.parameters())
    return MemoryPlan(held, passing, in_use, available, lm)


def check_memory(plan: MemoryPlan, cfg: LanguageModelSAERunnerConfig, n_saes: int) -> None:
    """NotEnoughMemory, with the table and the most useful things to change, if the plan does not fit."""
    if plan.needed <= GIVEN_UP_SHARE * plan.available:
        return
    everything = plan.held | plan.passing
    largest = max(everything, key=lambda name: everything[name])
    raise NotEnoughMemory(
        f"memory: this run needs {gigabytes(plan.needed)} more, but {gigabytes(plan.available)} are free:\n"
        f"{plan.table()}\nThe largest part is {largest}: {advice(plan, cfg, largest, n_saes)}."
    )


def advice(plan: MemoryPlan, cfg: LanguageModelSAERunnerConfig, largest: str, n_saes: int) -> str:
    """What to change, with about the value that would fit if nothing else is changed, where that can be told."""
    if largest.startswith("buffer"):
        return f"lower n_batches_in_buffer {lowered(plan, plan.held[largest], cfg.n_batches_in_buffer)}"
    if largest == "a pass of the language model":
        return f"lower store_batch_size (now {cfg.store_batch_size})"
    by_size = {name: n for name, n in plan.held.items() if not name.startswith("buffer")}
    passing = max((n for name, n in plan.passing.items() if name != "a pass of the language model"), default=0)
    found = ["train fewer autoencoders at once"] if n_saes > 1 else []
    found.append(f"lower expansion_factor {lowered(plan, sum(by_size.values()) + passing, cfg.expansion_factor)}")
    if largest == "a training step":
        found.append(f"set micro_batch_size lower (now {cfg.micro_batch_size or cfg.train_batch_size})")
    if largest == "an evaluation":
        found.append("set eval_every_steps=0")
    if largest in by_size and cfg.optimizer == "adam" and cfg.feature_sampling_method is None:
        saved = sum(n for name, n in by_size.items() if "optimizer" in name) * (
            1 - MOMENTS["adam8bit"] / MOMENTS["adam"]
        )
        fits = plan.needed - saved <= GIVEN_UP_SHARE * plan.available
        enough = "" if fits else ", which by itself is not enough"
        found.append(f'set optimizer="adam8bit" (a quarter of the optimizer\'s memory{enough})')
    return ", or ".join(found)


def lowered(plan: MemoryPlan, part: int, value: Any) -> str:
    """(now ...) to what leaves room for a `part` of memory that grows with the value."""
    room = GIVEN_UP_SHARE * plan.available - (plan.needed - part)
    fits = [int(number * room / part) for number in (value if isinstance(value, list) else [value])]
    return f"(now {value}) to about {max(fits)}" if max(fits) > 0 else f"(now {value}; the rest does not fit either)"


# --------------------------------------------------------------------------------------------------------- the parts


def weight_bytes(cfg: LanguageModelSAERunnerConfig) -> int:
    d_in, d_sae = sizes(cfg)
    d_out = cfg.d_out or d_in
    skip = d_in * d_out if cfg.skip_connection else 0
    return (d_sae * (d_in + d_out + 2) + d_out + skip) * cfg.dtype.itemsize


def each_of(weights: list[int]) -> str:
    low, high = min(weights), max(weights)
    return f"{gigabytes(low)} each" if low == high else f"{gigabytes(low)} to {gigabytes(high)}"


def sizes(cfg: LanguageModelSAERunnerConfig) -> tuple[int, int]:
    assert cfg.d_in is not None and cfg.d_sae is not None
    return cfg.d_in, cfg.d_sae


def step_bytes(cfg: LanguageModelSAERunnerConfig, weights: int) -> int:
    """Gradients, the encoder in the precision of its product, about nine tensors of rows, the entries of the code."""
    d_in, d_sae = sizes(cfg)
    rows = min(cfg.micro_batch_size or cfg.train_batch_size, cfg.tokens_per_step)
    active = cfg.k if cfg.architecture in FIXED_K else d_sae // 5  # before it is sparse, the code is dense
    if cfg.architecture not in FIXED_K:
        return weights + 9 * rows * d_in * 4 + 4 * rows * d_sae * 4
    prefixes = 5 if cfg.architecture == "matryoshka" else 1
    return int(1.25 * weights) + (8 + 4 * (prefixes - 1)) * rows * d_in * 4 + 80 * rows * active * prefixes


def pass_bytes(cfg: LanguageModelSAERunnerConfig, store: ActivationsStore, width: int) -> int:
    """What a pass harvests, twice while it is put into the buffer, and what one block computes with."""
    lm = store.model.cfg
    tokens = cfg.store_batch_size * cfg.context_size
    block = tokens * (3 * lm.d_mlp + 8 * lm.d_model + 3 * lm.n_heads * cfg.context_size)
    return (2 * tokens * width + block) * lm.dtype.itemsize


def evaluation_bytes(
    cfg: LanguageModelSAERunnerConfig,
    singles: list[LanguageModelSAERunnerConfig],
    store: ActivationsStore,
    width: int,
) -> int:
    """Clean and changed logits, the distributions of one prompt, all activations, and the largest dense codes."""
    lm = store.model.cfg
    widest = max(sizes(single)[1] for single in singles)
    n_prompts = min(prompts_of_a_pass(cfg.context_size, store.model, widest), len_of_evaluation(cfg))
    tokens = n_prompts * cfg.context_size
    codes = max(code_bytes(single, tokens) for single in singles)
    return (
        2 * tokens * lm.d_vocab * lm.dtype.itemsize + 5 * cfg.context_size * lm.d_vocab * 4 + codes + tokens * width * 4
    )


def code_bytes(cfg: LanguageModelSAERunnerConfig, tokens: int) -> int:
    """Dense codes, encoded and counted; where the largest are chosen, once more, and the encoder in 16 bits."""
    d_in, d_sae = sizes(cfg)
    if cfg.architecture not in FIXED_K:
        return 3 * tokens * d_sae * 4
    return 4 * tokens * d_sae * 4 + 2 * d_in * d_sae


def len_of_evaluation(cfg: LanguageModelSAERunnerConfig) -> int:
    return max(1, cfg.n_eval_batches * cfg.store_batch_size)
