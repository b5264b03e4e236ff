"""What a cache of activations would take: bytes on disk, time, and memory of a GPU, without a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sae_training.activations_store.cache_writer import record_fields
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.language_model.sizes import LanguageModelSizes, blocks_run
from sae_training.machine.precision import dtype_name
from sae_training.parallel import plan
from sae_training.parallel.plan import Machines
from sae_training.run.job_plan import CONTEXT, kept_share, loading_bytes
from sae_training.run.memory_plan import USABLE_SHARE, Rows, pass_bytes

SHARDS_IN_MEMORY = 3  # of a writer, on the host


@dataclass(frozen=True)
class CachePlan:
    """Bytes and seconds of a cache. Each rank writes shards of its own, so that ranks send each other nothing."""

    rows: int
    """Activations of each hook, in the rows form those that are kept."""
    bytes: float
    """Of the finished cache."""
    peak: float
    """The most that lies on the disk while it is written."""
    passes: float
    """Seconds of the passes of the language model, on all GPUs."""
    disk: float
    """Seconds of the disks: buckets written, read, and written as shards; contexts written."""
    seconds: float
    """The whole: passes are made while buckets are written, and shuffled afterwards."""
    of_gpu: float
    """Bytes of a GPU."""
    of_host: float
    """Bytes of a node's main memory that shards take."""
    fits: bool
    form: str
    passes_in_turn: int
    """How many passes a process makes before it is the next one's turn."""


def plan_cache(
    cfg: CacheActivationsRunnerConfig,
    hooks: Mapping[str, int],
    lm: LanguageModelSizes,
    machines: Machines,
    lm_gpus: int = 1,
    lm_rate: float | None = None,
) -> CachePlan:
    """Return the plan of the cache that `cfg` describes, with widths by hook.

    a record = 4 + sum of width * bytes of a number, and 4 for each hook with int8
    bytes    = records * (kept positions, if rows are written, + all positions, if contexts are)
    seconds  = max(passes, first writing / disks) + rows * 2 / disks
    """
    dtype = dtype_name(lm.dtype) if cfg.dtype == "auto" else cfg.dtype
    record = sum(n for _, _, n in record_fields(dict(hooks), dtype))
    per_pass = cfg.store_batch_size * cfg.context_size
    tokens = math.ceil(cfg.total_training_tokens / per_pass) * per_pass
    kept = int(tokens * kept_share(cfg))
    of_rows = kept * record if cfg.form in ("rows", "both") else 0
    of_contexts = tokens * record if cfg.form in ("contexts", "both") else 0
    flops = lm.flops(blocks_run(list(hooks), lm), cfg.context_size)
    one = plan.passes_seconds(tokens, flops, lm.bytes, per_pass, lm.dtype == torch.float32, machines)
    passes = (one if lm_rate is None else tokens / lm_rate) * min(lm_gpus, machines.n) / machines.n
    disks = machines.disk * machines.nodes * machines.efficiency
    first, shuffle = (of_rows + of_contexts) / disks, 2 * of_rows / disks
    width = sum(hooks.values())
    context = CONTEXT["cpu" if torch.device(cfg.device).type == "cpu" else "cuda"]
    of_gpu = context + lm.bytes / lm_gpus + pass_bytes(cfg, Rows(0, width, width), lm)
    loading = context + loading_bytes(cfg, lm) / lm_gpus
    shard, copies = cfg.shard_size_mb * 2**20, machines.n // lm_gpus or 1
    return CachePlan(
        rows=kept if of_rows else tokens,
        bytes=of_rows + of_contexts,
        peak=of_rows + of_contexts + (shard * copies if of_rows else 0),
        passes=passes,
        disk=first + shuffle,
        seconds=max(passes, first) + shuffle,
        of_gpu=max(of_gpu, loading),
        of_host=SHARDS_IN_MEMORY * shard * max(1, machines.gpus // lm_gpus),
        fits=max(of_gpu, loading) <= USABLE_SHARE * machines.memory,
        form=cfg.form,
        passes_in_turn=max(1, shard // (per_pass * record)) if of_contexts else 1,
    )
