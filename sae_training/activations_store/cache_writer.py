"""Writing activations to disk: one pass over the text, in bounded memory, continued after a kill.

    language model --pass after pass--> contexts/ (a shard whenever one is full)
    the same passes --each row to a random bucket--> buckets/ --each bucket shuffled--> rows/ (a shard each)

Progress is saved at each commit, whenever the buckets have grown by about a shard. A resumed job truncates whatever was
written after the last commit.

Several processes share the passes, and commit together. Each writes shards of contexts of its own, from as many passes
in a row as a shard holds, so that these files are those of one process. Without contexts they take turns at each pass.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store.cache import (
    DTYPES,
    MANIFEST,
    Manifest,
    Shard,
    position_from_json,
    position_to_json,
    read_manifest,
    to_stored,
)
from sae_training.activations_store.cache_buckets import Buckets
from sae_training.activations_store.cache_parts import bytes_of_parts, check_parts, write_parts
from sae_training.activations_store.cache_reader import CachedShards, rewrite_advice
from sae_training.activations_store.finiteness import check_finite, explain_live
from sae_training.activations_store.shuffle_buffer import MAX_EMPTY_PASSES
from sae_training.activations_store.store import ActivationsStore
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.config.checks import retired
from sae_training.config.io import config_to_dict
from sae_training.language_model.harvest import harvest
from sae_training.language_model.twins import compiled_blocks
from sae_training.machine.files import check_free_disk, sha256, write_safetensors
from sae_training.machine.interrupt import StopAsked, StopRequest, TrainingInterrupted
from sae_training.machine.paths import same_or_moved
from sae_training.machine.phases import phase, progress_bar
from sae_training.machine.precision import dtype_name
from sae_training.machine.run_files import HOLDER_FILE, LOG_FILE, STATUS_FILE
from sae_training.parallel.ranks import (
    agree_on_stops,
    check_all_see,
    is_first,
    n_ranks,
    of_all,
    of_first,
    rank,
    wait_for_all,
)

BUCKETS = "buckets"
OTHER_RANKS = "bucket_bytes_of_other_ranks"  # of the progress
PASSES_AHEAD = 2  # how many may wait for the disk

Stored = tuple[Tensor, Tensor | None]
"""Activations in the precision of the files, and for int8 their scales (`to_stored`)."""


class CacheWriter:
    """Writes the cache that `cfg` describes into `folder`; `about`: where its activations come from (`origin`)."""

    def __init__(
        self, cfg: CacheActivationsRunnerConfig, folder: Path, store: ActivationsStore, about: dict[str, Any]
    ) -> None:
        self.cfg, self.folder, self.store = cfg, folder, store
        lm_dtype = dtype_name(store.model.cfg.dtype)
        self.dtype = lm_dtype if cfg.dtype == "auto" else cfg.dtype
        self.widths = {site.name: site.d_in for site in store.sites.all}
        self.n_passes = math.ceil(cfg.total_training_tokens / (cfg.store_batch_size * cfg.context_size))
        self.per_pass = cfg.store_batch_size * cfg.context_size
        self.fields = record_fields(self.widths, self.dtype)
        self.record_bytes = sum(n for _, _, n in self.fields)
        self.shard_bytes = cfg.shard_size_mb * 2**20
        self.n_buckets = max(1, math.ceil(self.n_passes * self.per_pass * self.record_bytes / self.shard_bytes))
        self.passes_per_commit = max(1, self.shard_bytes // (self.per_pass * self.record_bytes))
        self.has_rows, self.has_contexts = cfg.form in ("rows", "both"), cfg.form in ("contexts", "both")
        self.buckets = Buckets(folder / BUCKETS, self.n_buckets, self.record_bytes, cfg.seed)
        self.passes_in_a_row = self.passes_per_commit if self.has_contexts else 1
        """How many passes a process makes before it is the next one's turn."""
        self.groups_before = 0
        """How many shards of contexts other processes write, in this turn, of passes before this one's."""
        self.kept: list[tuple[Tensor, list[Stored]]] = []
        """Tokens and activations of the passes that will be the next shard of contexts."""
        self.manifest = of_first(lambda: self.open(about))
        check_all_see(self.folder, "cached_activations_path")

    def open(self, about: dict[str, Any]) -> Manifest:
        """Return the manifest of the cache in the folder, if there is one of this config, else a new one."""
        config = config_to_dict(self.cfg)
        for name in ("cached_activations_path", "parallel_timeout_minutes"):
            del config[name]  # because the content does not depend on it
        if (self.folder / MANIFEST).is_file():
            found = read_manifest(self.folder)
            absent = {name: getattr(CacheActivationsRunnerConfig, name, None) for name in config}
            then, now = absent | found.config | found.about, config | about
            # The fingerprint says whether the weights differ, and a job that met no bad row wrote what skipping writes.
            for name in ("model_revision", "on_bad_rows", *retired(CacheActivationsRunnerConfig)):
                then.pop(name, None)
            pairs = {name: (old, now.get(name)) for name, old in then.items()}
            differences = {name: pair for name, pair in pairs.items() if not same_or_moved(*pair)}
            if differences:
                lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in differences.items())
                raise ValueError(
                    f"cached_activations_path: {self.folder} holds a cache of another config:\n{lines}\nGive another "
                    "path, or the old values."
                )
            return found
        # A process that was killed while it wrote the first manifest leaves a part of that, and its record.
        left = (MANIFEST, HOLDER_FILE, STATUS_FILE, LOG_FILE)
        if self.folder.exists() and any(path.name.removesuffix(".tmp") not in left for path in self.folder.iterdir()):
            raise ValueError(
                f"cached_activations_path: {self.folder} is not empty and holds no cache; give an empty or new folder."
            )
        n_bytes = self.n_passes * self.per_pass * self.record_bytes
        # Beside the rows there is one bucket of each process: it is deleted once its shard is written.
        n_bytes = (self.has_rows + self.has_contexts) * n_bytes + self.has_rows * self.shard_bytes * n_ranks()
        n_bytes += self.has_contexts * bytes_of_parts(self.store)
        check_free_disk(self.folder, n_bytes, "the activations need", "cached_activations_path")
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(about, self.widths, self.dtype, config)
        manifest.progress = {"passes": 0, "bucket_bytes": [0] * self.n_buckets, "tokens": self.position()}
        manifest.save(self.folder)
        return manifest

    def explain(self, hook: str, found: str) -> str:
        """Return the message for activations of `hook` that hold `found`, which are not written."""
        return (
            f"{explain_live(self.store.model)(hook, found)}. Nothing of this pass was written; delete {self.folder}, "
            "or give another cached_activations_path."
        )

    # ------------------------------------------------------------------------------------------------------ writing

    def write(self, stop: StopRequest, progress: Callable[[int, int, int], None] = lambda *_: None) -> None:
        """Write what is missing of the cache, or check a finished one; TrainingInterrupted if `stop` asks for it.

        `progress` is told how many passes are done, of how many, and the tokens of each.
        """
        start, first = time.perf_counter(), self.manifest.progress["passes"]
        progress(first, self.n_passes, self.per_pass)
        if self.manifest.complete:
            self.write_parts()  # which an earlier version has not
            with phase("checking", has_bar=True):
                self.check(stop)
            tqdm.write(f"{self.folder} is complete and undamaged: {self.summary()}.")
            return
        with phase("passes", has_bar=True):
            self.harvest(stop, progress)
        if self.has_rows:
            with phase("shuffling", has_bar=True):
                self.shuffle(stop)
        if is_first():
            shutil.rmtree(self.folder / BUCKETS, ignore_errors=True)
        self.write_parts()
        self.manifest.complete = True
        self.save_manifest()
        rate = (self.n_passes - first) * self.per_pass / (time.perf_counter() - start)
        tqdm.write(f"{self.folder}: {self.summary()}, {rate:,.0f} tokens/s.")

    def write_parts(self) -> None:
        """Write what an analysis of the contexts needs of the language model, unless it is there."""
        if self.has_contexts and is_first():
            write_parts(self.folder, self.manifest, self.store)
        self.manifest = of_first(lambda: self.manifest)

    def summary(self) -> str:
        shards = {"rows": self.manifest.rows, "contexts": self.manifest.contexts}
        counts = [f"{sum(shard.n for shard in of_form):,} {form}" for form, of_form in shards.items() if of_form]
        n_bytes = sum(shard.bytes for of_form in shards.values() for shard in of_form)
        hooks = f"{len(self.widths)} hook{'s' if len(self.widths) > 1 else ''}"
        return f"{' and '.join(counts)} of {hooks}, {self.dtype}, {n_bytes / 1e9:,.2f} GB"

    def check(self, stop: StopRequest) -> None:
        """Raise ValueError if a shard of the finished cache is missing or damaged."""
        check_parts(self.folder, self.manifest)
        for form, shards in (("rows", self.manifest.rows), ("contexts", self.manifest.contexts)):
            cached = CachedShards(self.folder, self.manifest, form, [])
            with progress_bar(f"checking {form}", len(shards), "shards") as bar:
                for shard in shards[rank() :: n_ranks()]:
                    try:
                        cached.check(shard)
                    except FileNotFoundError as error:
                        path = self.folder / shard.file
                        raise ValueError(f"{path}: no such file; {rewrite_advice(self.folder)}") from error
                    except StopAsked:
                        self.stop_here(stop)
                    bar.update(n_ranks())
        wait_for_all()

    def harvest(self, stop: StopRequest, tell: Callable[[int, int, int], None]) -> None:
        """Make the missing passes; a thread writes each of them while the next ones are computed."""
        progress = self.manifest.progress
        if is_first():
            self.buckets.cut_back(self.bucket_bytes(), len(self.manifest.rows), rewrite_advice(self.folder))
        wait_for_all()
        self.store.text.tokens.load_state_dict(position_from_json(progress["tokens"]))
        done = progress["passes"] * self.per_pass
        bar = progress_bar("caching", self.n_passes * self.per_pass, "tok", initial=done, leave=True)
        with ThreadPoolExecutor(1, thread_name_prefix="cache-write") as thread, bar:
            waiting: list[Future[None]] = []
            for i in range(progress["passes"], self.n_passes):
                try:
                    tokens = self.store.get_batch_tokens()
                except Exception:  # a bad row, or a network that fails: what has been computed is not lost
                    self.commit_waiting(waiting, i)
                    raise
                if self.is_own(i):
                    with compiled_blocks():
                        activations = harvest(self.store.model, tokens, self.store.sites.all, self.store.padded)
                    waiting.append(thread.submit(self.write_pass, i, tokens, activations))
                is_last = i + 1 == self.n_passes
                if is_last or (i + 1) % (self.passes_in_a_row * n_ranks()) == 0:  # each has had its turn
                    agree_on_stops()
                ends = (i + 1) % (self.passes_per_commit * n_ranks()) == 0
                commits = is_last or ends or stop.signal is not None
                while len(waiting) > (0 if commits else PASSES_AHEAD):
                    waiting.pop(0).result()
                if commits:  # nothing waits any more
                    self.commit(i + 1)
                bar.update(self.per_pass)
                tell(i + 1, self.n_passes, self.per_pass)
                if stop.signal is not None:
                    self.stop_here(stop)

    def is_own(self, i: int) -> bool:
        """Return whether pass number `i` is this process's to make."""
        return i // self.passes_in_a_row % n_ranks() == rank()

    def commit_waiting(self, waiting: list[Future[None]], passes: int) -> None:
        """Save the progress of the first `passes` passes, some of which still wait for the disk."""
        for future in waiting:
            future.result()
        if n_ranks() == 1 and passes > self.manifest.progress["passes"]:
            self.commit(passes)

    def write_pass(self, i: int, tokens: Tensor, activations: list[Tensor]) -> None:
        """Write the activations of pass number `i`, (prompts, context, d_in) for each hook."""
        keep = self.store.keeps(tokens, activations[0]) if self.has_rows else None
        # A cache of contexts serves them whole, so of these every position must be finite, padding aside.
        counts = tokens >= 0 if self.has_contexts or keep is None else keep
        by_hook = dict(zip(self.widths, activations, strict=True))
        check_finite({hook: of_hook[counts] for hook, of_hook in by_hook.items()}, self.explain)
        stored = [to_stored(of_hook, self.dtype) for of_hook in activations]
        if keep is not None:
            self.buckets.append(i, to_records(tokens, stored)[keep.flatten().cpu().numpy()])
        if self.has_contexts:
            self.kept.append((tokens, stored))

    def commit(self, passes: int) -> None:
        """Save the progress: a kill after this loses nothing of the first `passes` passes."""
        progress = self.manifest.progress
        if self.has_contexts:
            first = progress["passes"] // self.passes_in_a_row
            turns = -(-passes // self.passes_in_a_row) - first
            self.groups_before = (rank() - first) % n_ranks()
            shards = of_all(self.write_contexts())
            self.manifest.contexts += [shard for n in range(turns) if (shard := shards[(first + n) % n_ranks()])]
        if self.has_rows:
            self.buckets.flush_to_disk()
            sizes = of_all(self.buckets.sizes())
            progress["bucket_bytes"] = sizes[0]
            if others := sizes[1:] + progress.get(OTHER_RANKS, [])[n_ranks() - 1 :]:  # and of those that are gone
                progress[OTHER_RANKS] = others
            is_empty = not any(map(sum, [progress["bucket_bytes"], *others]))
            if is_empty and (passes == self.n_passes or passes >= MAX_EMPTY_PASSES):
                raise ValueError(
                    "exclude_special_tokens, seqpos_slice, max_activation_norm_multiple: found no activation to keep "
                    f"in {passes} passes of the language model, expected some; relax one of them, and delete "
                    f"{self.folder}."
                )
        progress |= {"passes": passes, "tokens": self.position()}
        self.save_manifest()

    def write_contexts(self) -> Shard | None:
        """Write the passes that were kept as a shard, if there are any."""
        passes, self.kept = self.kept, []
        if not passes:
            return None
        tensors = {"tokens": torch.cat([tokens for tokens, _ in passes]).cpu().to(torch.int32)}
        for j, hook in enumerate(self.widths):
            tensors[hook] = torch.cat([stored[j][0] for _, stored in passes]).cpu()
            if scales := [scale for _, stored in passes if (scale := stored[j][1]) is not None]:
                tensors[f"{hook}.scale"] = torch.cat(scales).cpu()
        return self.new_shard("contexts", len(self.manifest.contexts) + self.groups_before, tensors)

    def new_shard(self, form: str, number: int, tensors: dict[str, Tensor]) -> Shard:
        """Write a shard, which counts once it is listed in the manifest."""
        path = self.folder / form / f"{number:05d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_safetensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
        return Shard(str(path.relative_to(self.folder)), len(tensors["tokens"]), path.stat().st_size, sha256(path))

    def save_manifest(self) -> None:
        """Save the manifest, of which every process has the same; nobody goes on before it is on the disk."""
        if is_first():
            self.manifest.save(self.folder)
        wait_for_all()

    def shuffle(self, stop: StopRequest) -> None:
        """Write each bucket, shuffled, as a shard, and delete the bucket. Of several processes each takes one."""
        done, sizes = len(self.manifest.rows), self.bucket_bytes()
        advice = f"if all machines see this file, the same command goes on; else {rewrite_advice(self.folder)}"
        with progress_bar("shuffling", self.n_buckets, "shards", initial=done) as bar:
            for first in range(done, self.n_buckets, n_ranks()):
                b = first + rank()
                has_one = b < self.n_buckets
                records = self.buckets.shuffled(b, self.n_passes, sizes, advice) if has_one else None
                agree_on_stops()
                if stop.signal is not None:
                    self.stop_here(stop)
                shard = None if records is None else self.new_shard("rows", b, from_records(records, self.fields))
                self.manifest.rows += [of_rank for of_rank in of_all(shard) if of_rank is not None]
                self.save_manifest()
                if records is not None:
                    self.buckets.remove(b, len(sizes))
                bar.update(min(n_ranks(), self.n_buckets - first))

    def bucket_bytes(self) -> list[list[int]]:
        """Return how many bytes each process has appended to each bucket."""
        progress = self.manifest.progress
        return [progress["bucket_bytes"], *progress.get(OTHER_RANKS, [])]

    def position(self) -> dict[str, Any]:
        """Return the position in the text in JSON types."""
        return position_to_json(self.store.text.tokens.state_dict())

    def stop_here(self, stop: StopRequest) -> None:
        assert stop.signal is not None
        raise TrainingInterrupted(
            f"Stopped by {stop.signal.name}; the same command continues {self.folder}.",
            exit_code=128 + stop.signal,
        )


# ----------------------------------------------------------------------------------------------------------- records
# A record is one row in a bucket, as bytes: its token id, then for each hook the activations and, with int8, the scale.


def record_fields(widths: dict[str, int], dtype: str) -> list[tuple[str, torch.dtype, int]]:
    """Return (name, dtype, bytes) of each field of a record, in order; `widths`: of each hook by its name."""
    fields = [("tokens", torch.int32, 4)]
    for hook, width in widths.items():
        fields.append((hook, DTYPES[dtype], width * DTYPES[dtype].itemsize))
        if dtype == "int8":
            fields.append((f"{hook}.scale", torch.float32, 4))
    return fields


def to_records(tokens: Tensor, activations: list[Stored]) -> np.ndarray:
    """Return records (n, record_bytes), uint8, of `tokens` (prompts, context) and their activations at each hook."""
    parts = [tokens.flatten().to(torch.int32).unsqueeze(1)]
    for stored, scale in activations:
        parts.append(rearrange(stored, "prompts positions width -> (prompts positions) width"))
        if scale is not None:
            parts.append(scale.flatten().unsqueeze(1))
    return torch.cat([part.cpu().contiguous().view(torch.uint8) for part in parts], dim=1).numpy()


def from_records(records: np.ndarray, fields: list[tuple[str, torch.dtype, int]]) -> dict[str, Tensor]:
    """Return the tensors of the records by the names of `fields`: the inverse of `to_records`."""
    tensors, first = {}, 0
    for name, dtype, n_bytes in fields:
        column = torch.empty(0, n_bytes // dtype.itemsize, dtype=dtype)
        if len(records):
            column = torch.from_numpy(np.ascontiguousarray(records[:, first : first + n_bytes])).view(dtype)
        tensors[name] = column.squeeze(1) if name == "tokens" or name.endswith(".scale") else column
        first += n_bytes
    return tensors
