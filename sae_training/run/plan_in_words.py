"""Plans of jobs as people and programs read them: tables, the choice and its reason, and JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from sae_training.machine.memory import gigabytes
from sae_training.parallel.plan import GIGA, Machines
from sae_training.run.cache_plan import CachePlan
from sae_training.run.job_plan import Job, Way, best, counted, loads_in_place, smallest, ways
from sae_training.run.memory_plan import USABLE_SHARE

WIDTH = 110  # of a line of text

NOTE = "Sums of stated or measured rates, in which nothing overlaps; evaluation, checkpoints and AuxK are left out."


def wrapped(text: str) -> list[str]:
    """Return a long sentence in lines; words with hyphens stay whole."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def in_words(job: Job) -> str:
    """Return the plan of a run: what there is, a row for each way to share it, and the best with its memory."""
    found, machines = ways(job), job.machines
    disk = "" if job.is_live else of_disk(machines)
    lines = [of_job(job), f"{of_machines(machines)}{disk}", "", *table(found)]
    chosen = best(found)
    if chosen is None:
        lines += ["", *wrapped(f"Nothing fits. {what_would(job, found)}")]
    else:
        assert chosen.memory is not None
        lines += ["", f"Memory of a GPU, {chosen.flags}:", chosen.memory.table(), ""]
        lines += wrapped(f"Best: {chosen.flags}. {why(chosen, found)}")
        hours = job.cfg.total_training_tokens / chosen.tokens_per_s / 3600
        lines += wrapped(f"{job.cfg.total_training_tokens:,} tokens take {hours:,.2f} hours. {NOTE}")
        if chosen.read and machines.n > 1:
            rate = chosen.read / job.rows * chosen.tokens_per_s / GIGA
            by_itself = f"Each GPU reads its rows of the cache by itself, {rate:,.2f} GB/s: none is sent."
            lines += wrapped(f"{by_itself} A node's disk gives each byte once, for all its GPUs.")
        lines.append(f"A checkpoint has {gigabytes(checkpoint_bytes(job))}; {job.cfg.keep_checkpoints} are kept.")
    return "\n".join(lines) + "\n"


def in_json(job: Job) -> dict[str, Any]:
    """Return the plan of a run in JSON types: bytes, seconds, tokens/s."""
    found = ways(job)
    chosen = best(found)
    return {
        "gpus": job.machines.n,
        "nodes": job.machines.nodes,
        "gpu_memory": int(job.machines.memory),
        "language_model": {"params": job.lm.n_params, "bytes": job.lm.bytes, "flops_per_token": job.flops_per_token},
        "autoencoders": {"n": len(job.singles), "bytes": job.weights},
        "rows_per_step": job.rows,
        "checkpoint_bytes": checkpoint_bytes(job),
        "ways": [way_in_json(way) for way in found],
        "best": None if chosen is None else way_in_json(chosen) | {"why": why(chosen, found)},
    }


def way_in_json(way: Way) -> dict[str, Any]:
    plain: dict[str, Any] = {"parallel": way.parallel, "mesh": list(way.mesh), "fits": way.fits}
    if way.memory is None:
        return plain | {"refused": way.refused}
    parts = {part.kind.value: part.bytes for part in way.memory.parts}
    memory = {"peak": way.memory.peak, "in_use": way.memory.in_use, "loading": way.loading, "parts": parts}
    seconds = {"passes": way.passes, "reading": way.reading, "step": way.step, "exchange": way.exchange}
    return plain | {
        "memory": memory,
        "seconds_per_step": seconds,
        "bytes_received_per_step": dict(way.received),
        "bytes_read_per_step": way.read,
        "tokens_per_s": way.tokens_per_s,
    }


# ------------------------------------------------------------------------------------------------------------ the parts


def of_job(job: Job) -> str:
    cfg, lm = job.cfg, job.lm
    first = next(iter(job.singles.values()))
    live = "" if job.is_live else ", from a cache"
    k = f", k {first.k}" if first.architecture in ("topk", "batchtopk", "matryoshka") else ""
    return (
        f"{cfg.model_name}: {lm.n_params / GIGA:,.2f}e9 weights in {lm.precision}, {gigabytes(lm.bytes)}; "
        f"{job.flops_per_token / GIGA:,.2f} GFLOP a token\n"
        f"{counted(len(job.singles), 'autoencoder')}, the first {first.architecture} {first.d_in:,} x {first.d_sae:,}"
        f"{k}: {gigabytes(job.weights)} of weights; {job.rows:,} rows a step{live}"
    )


def of_machines(machines: Machines) -> str:
    m = machines
    return (
        f"{counted(m.n, 'GPU')} ({m.nodes} x {m.gpus}) of {gigabytes(m.memory)}; at {m.efficiency:.0%} of "
        f"{m.flops_16 / 1e12:,.0f} TFLOP/s (float32 {m.flops_32 / 1e12:,.0f}), memory {m.bandwidth / GIGA:,.0f}, "
        f"links {m.interconnect / GIGA:,.0f}, network {m.network / GIGA:,.0f} GB/s"
    )


def of_disk(machines: Machines) -> str:
    return f", disk {machines.disk / GIGA:,.1f} GB/s a node"


def table(found: list[Way]) -> list[str]:
    """Return the lines of a table: a way to share, memory, ms of a step, what the busiest rank receives in one.

    Rows come from passes of the language model, or from reading a cache.
    """
    source = "reading" if any(way.reading for way in found) else "passes"
    rows = [["", "fits", "GiB a GPU", "tokens/s", source, "step", "exchange ms", "received MB"]]
    for way in found:
        if way.memory is None:
            rows.append([way.flags, "no", way.refused])
            continue
        peak = f"{max(way.memory.peak, way.loading) / 2**30:,.1f}"
        ms = [f"{1000 * seconds:,.1f}" for seconds in (way.passes + way.reading, way.step, way.exchange)]
        received = f"{sum(way.received.values()) / 1e6:,.1f}"
        rows.append([way.flags, "yes" if way.fits else "no", peak, f"{way.tokens_per_s:,.0f}", *ms, received])
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    first = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)] if row in full else row
        lines.append("  ".join([f"{row[0]:<{first}}", f"{row[1]:<4}", *cells[2:]]).rstrip())
    return lines


def why(chosen: Way, found: list[Way]) -> str:
    """Return why this way: how the others are slower, or do not fit."""
    if len(found) == 1:
        return f"It takes {chosen.tokens_per_s:,.0f} tokens/s."
    reasons, meshes = [], 0
    for way in found:
        if way is chosen:
            continue
        name = way.flags.removeprefix("--parallel ")
        if way.memory is None:
            reasons.append(f"{name}: {way.refused}")
        elif way.fits:
            reasons.append(f"{name} has {way.tokens_per_s:,.0f}")
        elif way.parallel == "data,latents":
            meshes += 1
        else:
            reasons.append(f"{name} needs {max(way.memory.peak, way.loading) / 2**30:,.0f} GiB a GPU")
    reasons += [f"{meshes} {'meshes do' if meshes > 1 else 'mesh does'} not fit"] * (meshes > 0)
    fastest = max(way.tokens_per_s for way in found if way.fits)
    is_it = "the fastest that fits" if chosen.tokens_per_s == fastest else "as fast as any that fits, and simpler"
    return f"It is {is_it}, with {chosen.tokens_per_s:,.0f} tokens/s; " + "; ".join(reasons) + "."


def what_would(job: Job, found: list[Way]) -> str:
    """Return what would make room: fewer bytes of the language model, or more nodes."""
    memory = job.machines.memory
    if job.loading > USABLE_SHARE * memory:
        gpus = math.ceil(job.lm.bytes / (USABLE_SHARE * memory))
        afterwards = f" while it is loaded (float32) and {gigabytes(job.lm.bytes // job.lm_gpus)} afterwards"
        return (
            f"The language model alone takes {gigabytes(job.loading)} of a GPU"
            f"{'' if loads_in_place(job.cfg) else afterwards}: spread it over {gpus} GPUs or more (--lm_gpus), load it "
            "in 8 bits, or train from a cache that a larger machine wrote."
        )
    least = min((way for way in found if way.memory), key=lambda way: way.memory.peak)  # pyright: ignore
    assert least.memory is not None
    largest = max(least.memory.parts, key=lambda part: part.bytes)
    more = smallest(job)
    enough = f"; {more[0].nodes} nodes would do, with {more[1].flags}" if more else "; no number of nodes would do"
    return f"Least memory takes {least.flags}, whose largest part is {largest.name}{enough}."


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of a resumable checkpoint: weights, moments and the buffer of all ranks."""
    memory = ways(job)[0].memory
    assert memory is not None
    return sum(part.bytes for part in memory.held)


# --------------------------------------------------------------------------------------------------------------- caches


def cache_in_words(plan: CachePlan, machines: Machines, hooks: Mapping[str, int]) -> str:
    """Return the plan of a cache."""
    room = "fits" if plan.fits else "does NOT fit"
    return (
        f"{of_machines(machines)}{of_disk(machines)}\n"
        f"{plan.rows:,} rows of {counted(len(hooks), 'hook')}: {plan.bytes / GIGA:,.1f} GB on disk, "
        f"{plan.peak / GIGA:,.1f} GB at most while it is written\n"
        f"passes {plan.passes / 3600:,.2f} h, disk {plan.disk / 3600:,.2f} h, in all {plan.seconds / 3600:,.2f} h "
        f"({plan.rows / plan.seconds:,.0f} rows/s)\n"
        f"a GPU needs {gigabytes(plan.of_gpu)} of {gigabytes(machines.memory)}: {room}; shards take "
        f"{gigabytes(plan.of_host)} of a node's main memory\n"
    ) + "".join(f"{line}\n" for line in wrapped(turns(plan)) if machines.n > 1)


def turns(plan: CachePlan) -> str:
    """Return how several processes share the writing."""
    buckets = (
        "append the rows to buckets of their own; the files of a bucket are shuffled together by one of them, into a "
        "shard of rows"
    )
    contexts = "write these as a shard of contexts"
    does = {"rows": buckets, "contexts": contexts, "both": f"{contexts}, and {buckets}"}[plan.form]
    return f"Processes make passes in turn, {plan.passes_in_turn:,} each, and {does}."


def cache_in_json(plan: CachePlan, machines: Machines) -> dict[str, Any]:
    """Return the plan of a cache in JSON types: bytes and seconds."""
    return {"gpus": machines.n, "nodes": machines.nodes} | vars(plan)
