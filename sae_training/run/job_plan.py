"""What a run would take on many GPUs, in each way to share it: memory of a rank, time of a step, bytes received.

Nothing is loaded. Memory is that of `memory_plan`, of the rank that holds most; operations and bytes are those of
`parallel.plan`. A `Job` is what is asked, a `Way` one way to share it, and `best` the fastest way that fits.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import FIXED_K
from sae_training.kernels.triton_products import SPARSE_FROM
from sae_training.language_model.sizes import LanguageModelSizes, blocks_run
from sae_training.machine.precision import at_least_float32
from sae_training.parallel import plan
from sae_training.parallel.balance import shared_out
from sae_training.parallel.plan import Machines, Shape
from sae_training.run.memory_plan import (
    MATRYOSHKA_PREFIXES,
    MemoryPlan,
    Rows,
    chooses_by_batch,
    folded_bytes,
    parts_of,
    saves_from_a_copy,
    weight_bytes,
)

Singles = Mapping[str, LanguageModelSAERunnerConfig]

CONTEXT = {"cuda": 2 * 2**30, "cpu": 800 * 2**20}
"""Bytes of a process with nothing in it: python, its libraries, those of a GPU, NCCL's buffers.

That of a CPU is measured (two ranks, demo model: 1.03 GB at the peak, planned 1.03), that of a GPU stated."""

NEARLY = 0.95  # of the fastest: a plan is not as exact as that

MOST_NODES = 4096  # in the search for the smallest job that fits


@dataclass(frozen=True)
class Job:
    """A run, the sizes of its language model, and the machines that it is to run on."""

    cfg: LanguageModelSAERunnerConfig
    singles: Singles
    """Single configs by the names of their autoencoders, widths filled in."""
    lm: LanguageModelSizes
    machines: Machines
    triton: bool = False
    """Whether the Triton kernels are on, without which a GPU computes steps the dense way."""
    lm_gpus: int = 1
    """GPUs of a node that hold one copy of the language model together, and work one after the other."""
    lm_rate: float | None = None
    """Tokens/s of one GPU's passes, if measured."""
    step_rate: float | None = None
    """Rows/s of the step of all autoencoders on one GPU, if measured."""

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.cfg.device).type != "cpu"

    @property
    def rows(self) -> int:
        return self.cfg.tokens_per_step

    @property
    def hooks(self) -> dict[str, int]:
        """The width at each hook that the run reads."""
        return hooks_of(self.singles)

    @property
    def is_live(self) -> bool:
        return self.cfg.use_cached_activations is not True

    @property
    def tokens(self) -> float:
        """Tokens of the language model for the rows of a step."""
        return self.rows / kept_share(self.cfg)

    @property
    def flops_per_token(self) -> float:
        """Operations of a pass, which stops after the last hook."""
        return self.lm.flops(blocks_run(list(self.hooks), self.lm), self.cfg.context_size)

    @property
    def loading(self) -> int:
        """Bytes of a GPU while the language model is loaded."""
        return CONTEXT["cuda" if self.on_gpu else "cpu"] + loading_bytes(self.cfg, self.lm) // self.lm_gpus

    @property
    def weights(self) -> int:
        return sum(map(weight_bytes, self.singles.values()))


@dataclass(frozen=True)
class Way:
    """One way to share a job. Times are seconds of a step; bytes are those that the busiest rank receives in a step."""

    parallel: str
    mesh: tuple[int, int]
    """Groups that share the rows, and ranks of a group that share the latents."""
    refused: str = ""
    """Why the job cannot be shared so at all."""
    memory: MemoryPlan | None = None
    loading: int = 0
    """Bytes of a GPU while the language model is loaded, before anything else is there."""
    passes: float = 0.0
    reading: float = 0.0
    step: float = 0.0
    exchange: float = 0.0
    received: Mapping[str, float] = field(default_factory=dict)
    read: float = 0.0
    """Bytes of a cache of rows that a rank reads in a step. None sends rows of a cache to another."""
    tokens_per_s: float = 0.0

    @property
    def fits(self) -> bool:
        memory = self.memory
        return memory is not None and max(memory.peak, self.loading) <= memory.in_use + memory.usable

    @property
    def flags(self) -> str:
        """What to give on the command line."""
        mesh = f" --mesh {self.mesh[0]},{self.mesh[1]}" if self.parallel == "data,latents" else ""
        return f"--parallel {self.parallel}{mesh}" if self.parallel != "one GPU" else "one GPU"


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def kept_share(cfg: Any) -> float:
    """Return the share of positions that become rows: those of seqpos_slice, BOS not among them if it is left out."""
    kept = range(cfg.context_size)[slice(*cfg.seqpos_slice)] if cfg.seqpos_slice else range(cfg.context_size)
    return (len(kept) - (cfg.exclude_special_tokens and cfg.prepend_bos and 0 in kept)) / cfg.context_size


def loads_in_place(cfg: Any) -> bool:
    """Return whether transformers puts each weight where it stays, in the precision that it keeps."""
    return cfg.device_map is not None or cfg.load_in_8bit


def loading_bytes(cfg: Any, lm: LanguageModelSizes) -> int:
    """Return the bytes of the language model while it is loaded: in float32, if it is processed and cast afterwards."""
    return lm.bytes if loads_in_place(cfg) else lm.n_params * plan.FLOAT


def hooks_of(singles: Singles) -> dict[str, int]:
    found: dict[str, int] = {}
    for cfg in singles.values():
        assert cfg.d_in is not None
        found[cfg.resolved_hook_point] = cfg.d_in
        if cfg.resolved_target_hook_point is not None:
            found[cfg.resolved_target_hook_point] = cfg.d_out or cfg.d_in
    return found


def shape_of(cfg: LanguageModelSAERunnerConfig, job: Job) -> Shape:
    """Return what the step of a whole autoencoder depends on."""
    assert cfg.d_in is not None and cfg.d_sae is not None
    has_k = cfg.architecture in FIXED_K
    precision = "float32" if cfg.dtype == torch.float32 else "bfloat16"
    of_rows = cfg.architecture == "topk" or cfg.architecture == "matryoshka" and cfg.matryoshka_selection == "topk"
    sparse = job.triton and of_rows and cfg.d_sae >= SPARSE_FROM[precision] * cfg.k if job.on_gpu else has_k
    return Shape(
        cfg.d_in, cfg.d_out or cfg.d_in, cfg.d_sae, cfg.k if has_k else 0, weight_bytes(cfg), cfg.optimizer, sparse,
        cfg.dtype.itemsize, active=cfg.k if has_k else 0,
    )  # fmt: skip


def shape_of_part(part: LanguageModelSAERunnerConfig, whole: LanguageModelSAERunnerConfig, job: Job) -> Shape:
    """Return what the step of a shard of the latents depends on: computed as the whole, with its share of k."""
    shape, of_whole = shape_of(part, job), shape_of(whole, job)
    active = of_whole.active * shape.d_sae / of_whole.d_sae
    return dataclasses.replace(shape, sparse=of_whole.sparse, active=active)


# ----------------------------------------------------------------------------------------------------------- the ways


def ways(job: Job) -> list[Way]:
    """Return all ways to share the job over its GPUs, and one GPU alone first."""
    n = job.machines.n
    found = [shared(job, "one GPU", 1, 1)]
    if n > 1:
        found += [by_layers(job, n), shared(job, "data", n, 1), shared(job, "latents", 1, n)]
        found += [shared(job, "data,latents", n // group, group) for group in range(2, n) if n % group == 0]
    return found


def best(found: list[Way]) -> Way | None:
    """Return the first of the ways that fit and have nearly the most tokens/s: the simpler ones come first."""
    fitting = [way for way in found if way.fits]
    most = max((way.tokens_per_s for way in fitting), default=0.0)
    return next((way for way in fitting if way.tokens_per_s >= NEARLY * most), None)


def smallest(job: Job) -> tuple[Machines, Way] | None:
    """Return the fewest nodes, a power of two, of a job that fits, and how; None if none does."""
    nodes = job.machines.nodes
    while (nodes := 2 * nodes) <= MOST_NODES:
        machines = dataclasses.replace(job.machines, nodes=nodes)
        if way := best(ways(dataclasses.replace(job, machines=machines))):
            return machines, way
    return None


def by_layers(job: Job, n: int) -> Way:
    """Deal the autoencoders out to N ranks, as a run does. The slowest rank and the fullest one may be two."""
    if n > len(job.singles):
        return Way("layers", (1, n), f"{counted(len(job.singles), 'autoencoder')} for {n} GPUs")
    costs = {name: (cfg.d_sae or 0) * (cfg.d_in or 0) for name, cfg in job.singles.items()}
    owned = [{name: job.singles[name] for name in names} for names in shared_out(costs, n)]
    widths = [sum(hooks_of(own).values()) for own in owned]
    per_pass, buffered = job.cfg.store_batch_size * job.cfg.context_size, job.cfg.buffer_rows
    every = sum(job.hooks.values())
    memories = [
        memory_of_rank(job, list(own.values()), Rows(buffered, width, every, (n - 1) * per_pass), n)
        for own, width in zip(owned, widths, strict=True)
    ]
    itemsize = job.lm.dtype.itemsize
    read = 0.0 if job.is_live else job.rows * max(widths) * itemsize
    of_nodes = [owned[first : first + job.machines.gpus] for first in range(0, n, job.machines.gpus)]
    widths_of_nodes = [sum(hooks_of(dict(ChainMap(*of_node))).values()) for of_node in of_nodes]
    of_node = 0.0 if job.is_live else job.rows * max(widths_of_nodes) * itemsize
    received = plan.rows_received(job.rows, max(widths), itemsize, n) if job.is_live else 0.0
    steps = [sum(step_of(shape_of(cfg, job), job, job.rows) for cfg in own.values()) for own in owned]
    return timed(
        job,
        Way("layers", (1, n), memory=max(memories, key=lambda m: m.needed), received={"rows": received}, read=read),
        n, max(steps), plan.all_to_all_seconds(received, job.machines, n), of_node,
    )  # fmt: skip


def shared(job: Job, name: str, groups: int, of_group: int) -> Way:
    """Share the rows among groups, and the latents among the ranks of a group; all ranks share the buffer."""
    n, machines, itemsize = groups * of_group, job.machines, job.lm.dtype.itemsize
    singles = [a_part(single, of_group) for single in job.singles.values()]
    narrowest = min(single.d_sae or 0 for single in job.singles.values())
    if job.rows < groups or of_group > 1 and 2 * of_group > narrowest:
        few = f"{job.rows:,} rows a step" if job.rows < groups else f"{narrowest:,} latents"
        return Way(name, (groups, of_group), f"{few} for {n} GPUs")
    width, per_pass = sum(job.hooks.values()), job.cfg.store_batch_size * job.cfg.context_size
    rows = Rows(job.cfg.buffer_rows, width, width)
    if n > 1:
        rows = Rows.dealt(job.cfg.buffer_rows, width, n, per_pass)
    shards = [shape_of_part(*pair, job) for pair in zip(singles, job.singles.values(), strict=True)]
    of_latents = sent_for_latents(job, shards, job.rows / groups, of_group) if of_group > 1 else {}
    of_rows = sent_for_rows(shards, groups) if groups > 1 else {}
    seconds = plan.ring_seconds(sum(of_latents.values()), machines, of_group)
    received, by_batch = {**of_latents, **of_rows}, choice_by_batch(job, n)
    seconds += plan.ring_seconds(sum(of_rows.values()) + by_batch, machines, n)
    if n > 1:
        received["choice"] = of_latents.get("choice", 0.0) + by_batch
    if n > 1 and job.is_live:
        dealt = plan.rows_dealt(job.rows, width, itemsize, n, job.cfg.buffer_rows)
        gathered = plan.rows_gathered(job.rows / groups, width, itemsize, of_group)
        received["rows"] = dealt + gathered
        seconds += plan.all_to_all_seconds(dealt, machines, n) + plan.all_to_all_seconds(gathered, machines, of_group)
    read = 0.0 if job.is_live else job.rows * width * itemsize
    step = sum(step_of(shard, job, job.rows / groups) for shard in shards)
    memory = memory_of_rank(job, singles, rows, n, (groups, of_group))
    return timed(
        job, Way(name, (groups, of_group), memory=memory, received=received, read=read), n, step, seconds, read
    )


def sent_for_latents(job: Job, shards: list[Shape], rows: float, n: int) -> dict[str, float]:
    """Return the bytes that a rank receives in a step on so many rows, where N ranks share the latents."""
    pairs = list(zip(shards, job.singles.values(), strict=True))
    choice = sum(plan.choice_of_rows_gathered(rows, shard.k, n) for shard, cfg in pairs if not chooses_by_batch(cfg))
    width = sum(n_outs(cfg) * shard.d_out for shard, cfg in pairs)
    return {"choice": choice, "reconstructions": plan.reconstructions_reduced(rows, width, n)}


def sent_for_rows(shards: list[Shape], n: int) -> dict[str, float]:
    """Return the bytes that a rank receives in a step, beside rows of activations, where N ranks share the rows."""
    return {
        "gradients": sum(plan.ring_all_reduce(shard.weights, n) for shard in shards),
        "counts": sum(plan.counts_reduced(shard.d_sae, n) for shard in shards),
    }


def choice_by_batch(job: Job, n: int) -> float:
    """Return the bytes that a rank receives in a step for choices among all rows and latents of N ranks."""
    ks = [cfg.k for cfg in job.singles.values() if chooses_by_batch(cfg)]
    return sum(plan.choice_of_batch_gathered(job.rows, k, n, sampled=not job.on_gpu) for k in ks)


def n_outs(cfg: LanguageModelSAERunnerConfig) -> int:
    """Return how many reconstructions of a row a step makes, AuxK's left out."""
    if cfg.architecture == "matryoshka":
        return MATRYOSHKA_PREFIXES
    return 2 if cfg.architecture == "gated" or cfg.multi_topk else 1


def a_part(cfg: LanguageModelSAERunnerConfig, ranks: int) -> LanguageModelSAERunnerConfig:
    """Return the config, unchecked, of a shard of the latents."""
    part: Any = copy.copy(cfg)
    if ranks > 1:
        part.n_latents = math.ceil(part.d_sae / ranks)
        part.k = min(part.k, part.n_latents)
    return part


def memory_of_rank(
    job: Job, singles: list[LanguageModelSAERunnerConfig], rows: Rows, n: int, mesh: tuple[int, int] = (1, 1)
) -> MemoryPlan:
    """Return the memory plan of one of `n` ranks, that share rows and latents by `mesh`; one alone harvests ahead."""
    if not job.is_live:
        rows = dataclasses.replace(rows, buffered=0)
    dense = not all(shape_of(single, job).sparse for single in job.singles.values())
    parts = parts_of(job.cfg, singles, rows, job.lm, job.on_gpu and n == 1, dense, mesh)
    lm = job.lm.bytes // job.lm_gpus
    in_use = CONTEXT["cuda" if job.on_gpu else "cpu"] + lm
    memory = MemoryPlan(parts, in_use, int(job.machines.memory) - in_use, lm)
    return (
        memory.with_copy(folded_bytes(job.cfg, singles)) if saves_from_a_copy(job.cfg, n) and not job.on_gpu else memory
    )


def step_of(sae: Shape, job: Job, rows: float) -> float:
    """Return the seconds of a step on so many rows; if the rate of steps is measured, in proportion to that."""
    seconds = plan.step_seconds(sae, rows, job.machines)
    if job.step_rate is None:
        return seconds
    shapes = [shape_of(single, job) for single in job.singles.values()]
    return seconds / sum(plan.step_seconds(one, job.rows, job.machines) for one in shapes) * job.rows / job.step_rate


def passes_of(job: Job, tokens: float, n: int) -> float:
    """Return the seconds of the passes for so many tokens, made by all copies of the language model at once."""
    per_pass = job.cfg.store_batch_size * job.cfg.context_size
    wide = job.lm.dtype.itemsize >= at_least_float32(torch.float32).itemsize
    one = plan.passes_seconds(tokens, job.flops_per_token, job.lm.bytes, per_pass, wide, job.machines)
    return (one if job.lm_rate is None else tokens / job.lm_rate) * min(job.lm_gpus, n) / n


def timed(job: Job, way: Way, n: int, step: float, exchange: float, of_node: float) -> Way:
    """Return the way with the seconds of its parts, of which a node reads `of_node` bytes of a cache in a step."""
    passes = passes_of(job, job.tokens, n) if job.is_live else 0.0
    reading = plan.reading_seconds(of_node, job.machines)
    seconds = {"passes": passes, "reading": reading, "step": step, "exchange": exchange}
    return dataclasses.replace(way, loading=job.loading, tokens_per_s=job.rows / sum(seconds.values()), **seconds)
