"""Writing activations to disk: one pass over the text, in bounded memory, continued after a kill.

    cache_activations_runner(cfg)
      language model --pass after pass--> contexts/ (a shard whenever one is full)
      the same passes --each row thrown into a random bucket--> buckets/ --each shuffled--> rows/ (a shard each)

Rows that are thrown into random buckets, each of which is then shuffled, are in a uniformly random order over the whole
cache (Rao 1961; Sandelius 1962): two passes over the disk, and never more than a bucket in memory. Progress is kept at
each commit, when the buckets have grown by about a shard; what was written after it, whoever goes on cuts off.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store.cache import MANIFEST, Manifest, Shard, anew, encode, read_manifest
from sae_training.activations_store.cache_reader import CachedShards
from sae_training.activations_store.shuffle_buffer import MAX_EMPTY_PASSES
from sae_training.activations_store.store import ActivationsStore
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.config.checks import retired
from sae_training.config.io import config_to_dict
from sae_training.language_model.harvest import harvest
from sae_training.language_model.twins import compiled_blocks
from sae_training.machine.files import check_free_disk, flush_to_disk, sha256, write_safetensors
from sae_training.machine.interrupt import StopRequest, TrainingInterrupted

BUCKETS = "buckets"

PASSES_AHEAD = 2  # that may wait for the disk


class CacheWriter:
    """Everything with state while a cache is written."""

    def __init__(
        self, cfg: CacheActivationsRunnerConfig, folder: Path, store: ActivationsStore, about: dict[str, Any]
    ) -> None:
        self.cfg, self.folder, self.store = cfg, folder, store
        lm_dtype = str(store.model.cfg.dtype).removeprefix("torch.")
        self.dtype = lm_dtype if cfg.dtype == "auto" else cfg.dtype
        self.sites = {site.name: site.d_in for site in store.hooks}
        self.n_passes = math.ceil(cfg.total_training_tokens / (cfg.store_batch_size * cfg.context_size))
        self.per_pass = cfg.store_batch_size * cfg.context_size
        self.fields = record_fields(self.sites, self.dtype)
        self.record_bytes = sum(n for _, _, n in self.fields)
        self.shard_bytes = cfg.shard_size_mb * 2**20
        self.n_buckets = max(1, math.ceil(self.n_passes * self.per_pass * self.record_bytes / self.shard_bytes))
        self.passes_per_commit = max(1, self.shard_bytes // (self.per_pass * self.record_bytes))
        self.has_rows, self.has_contexts = cfg.form in ("rows", "both"), cfg.form in ("contexts", "both")
        self.kept: list[tuple[Tensor, list[tuple[Tensor, Tensor | None]]]] = []
        """Passes that wait to become a shard of contexts."""
        self.manifest = self.open(about)

    def open(self, about: dict[str, Any]) -> Manifest:
        """The manifest of the unfinished cache in the folder, if it is of this config, or a new one."""
        config = config_to_dict(self.cfg)
        del config["cached_activations_path"]  # the content does not depend on it
        if (self.folder / MANIFEST).is_file():
            found = read_manifest(self.folder)
            absent = {name: getattr(CacheActivationsRunnerConfig, name, None) for name in config}
            then, now = absent | found.config | found.about, config | about
            for name in ("model_revision", *retired(CacheActivationsRunnerConfig)):
                then.pop(name, None)  # the fingerprint tells whether the weights are others
            differences = {name: (old, now.get(name)) for name, old in then.items() if old != now.get(name)}
            if differences:
                lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in differences.items())
                raise ValueError(
                    f"cached_activations_path: {self.folder} holds a cache of another config:\n{lines}\nGive another "
                    "path, or the old values."
                )
            return found
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"cached_activations_path: {self.folder} is not empty and holds no cache; give a path of its own."
            )
        n_bytes = self.n_passes * self.per_pass * self.record_bytes
        # A bucket goes as soon as the shard made of it is there.
        n_bytes = (self.has_rows + self.has_contexts) * n_bytes + self.has_rows * self.shard_bytes
        check_free_disk(self.folder, n_bytes, "the activations need", "cached_activations_path")
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(about, self.sites, self.dtype, config)
        manifest.progress = {"passes": 0, "bucket_bytes": [0] * self.n_buckets, "tokens": tokens_state(self.store)}
        manifest.save(self.folder)
        return manifest

    # ------------------------------------------------------------------------------------------------------ writing

    def write(self, stop: StopRequest) -> None:
        if self.manifest.complete:
            self.check(stop)
            tqdm.write(f"{self.folder} is complete, and as it was written: {self.summary()}.")
            return
        start, first = time.perf_counter(), self.manifest.progress["passes"]
        self.harvest(stop)
        if self.has_rows:
            self.shuffle(stop)
        shutil.rmtree(self.folder / BUCKETS, ignore_errors=True)
        self.manifest.complete = True
        self.manifest.save(self.folder)
        rate = (self.n_passes - first) * self.per_pass / (time.perf_counter() - start)
        tqdm.write(f"{self.folder}: {self.summary()}, {rate:,.0f} tokens/s.")

    def summary(self) -> str:
        shards = {"rows": self.manifest.rows, "contexts": self.manifest.contexts}
        counts = [f"{sum(shard.n for shard in of_form):,} {form}" for form, of_form in shards.items() if of_form]
        n_bytes = sum(shard.bytes for of_form in shards.values() for shard in of_form)
        hooks = f"{len(self.sites)} hook{'s' if len(self.sites) > 1 else ''}"
        return f"{' and '.join(counts)} of {hooks}, {self.dtype}, {n_bytes / 1e9:,.2f} GB"

    def check(self, stop: StopRequest) -> None:
        """ValueError if a shard of the finished cache is gone or damaged."""
        for form, shards in (("rows", self.manifest.rows), ("contexts", self.manifest.contexts)):
            cached = CachedShards(self.folder, self.manifest, form, [])
            for shard in tqdm(shards, desc=f"checking {form}", unit="shard", leave=False):
                try:
                    cached.check(shard)
                except FileNotFoundError as error:
                    raise ValueError(f"{self.folder / shard.file}: no such file; {anew(self.folder)}") from error
                if stop.signal is not None:
                    self.stop_here(stop)

    def harvest(self, stop: StopRequest) -> None:
        """The passes that are still to be made, each written by a thread while the next ones are computed."""
        progress = self.manifest.progress
        self.cut_back()
        self.store.passes.go_to(progress["tokens"])
        bar = tqdm(total=self.n_passes * self.per_pass, initial=progress["passes"] * self.per_pass, unit="tok")
        bar.set_description("caching")
        with ThreadPoolExecutor(1, thread_name_prefix="cache-write") as thread, bar:
            waiting: list[Future[None]] = []
            for i in range(progress["passes"], self.n_passes):
                tokens = self.store.get_batch_tokens()
                with compiled_blocks():
                    found = harvest(self.store.model, tokens, self.store.hooks)
                commits = (i + 1) % self.passes_per_commit == 0 or i + 1 == self.n_passes or stop.signal is not None
                waiting.append(thread.submit(self.write_pass, i, tokens, found))
                while len(waiting) > (0 if commits else PASSES_AHEAD):
                    waiting.pop(0).result()
                if commits:  # everything up to here is on the disk
                    self.commit(i + 1)
                bar.update(self.per_pass)
                if stop.signal is not None:
                    self.stop_here(stop)

    def write_pass(self, i: int, tokens: Tensor, found: list[Tensor]) -> None:
        encoded = [encode(activations, self.dtype) for activations in found]
        if self.has_rows:
            self.throw(i, tokens, self.store.keeps(tokens, found[0]), encoded)
        if self.has_contexts:
            self.kept.append((tokens, encoded))

    def throw(self, i: int, tokens: Tensor, keep: Tensor, encoded: list[tuple[Tensor, Tensor | None]]) -> None:
        """Append each row of a pass at the positions that count (`keep`, as `tokens`) to a random bucket."""
        records = as_records(tokens, encoded)[keep.flatten().cpu().numpy()]
        bucket = np.random.default_rng([self.cfg.seed, i]).integers(self.n_buckets, size=len(records))
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(self.n_buckets + 1))
        records = records[order]
        (self.folder / BUCKETS).mkdir(exist_ok=True)
        for b in range(self.n_buckets):
            if edges[b] < edges[b + 1]:
                with self.bucket(b).open("ab") as file:
                    file.write(records[edges[b] : edges[b + 1]].tobytes())

    def commit(self, passes: int) -> None:
        """From here on, a kill loses nothing up to this pass."""
        progress = self.manifest.progress
        if self.has_contexts:
            self.write_contexts()
        if self.has_rows:
            buckets = (self.bucket(b) for b in range(self.n_buckets))
            progress["bucket_bytes"] = [path.stat().st_size if path.exists() else 0 for path in buckets]
            if not any(progress["bucket_bytes"]) and (passes == self.n_passes or passes >= MAX_EMPTY_PASSES):
                raise ValueError(
                    f"exclude_special_tokens, seqpos_slice, max_activation_norm_multiple: of {passes} passes of the "
                    f"language model they leave no row; relax one of them, and delete {self.folder}."
                )
        progress |= {"passes": passes, "tokens": tokens_state(self.store)}
        self.manifest.save(self.folder)

    def write_contexts(self) -> None:
        passes = self.kept
        self.kept = []
        tensors = {"tokens": torch.cat([tokens for tokens, _ in passes]).cpu().to(torch.int32)}
        for j, hook in enumerate(self.sites):
            tensors[hook] = torch.cat([encoded[j][0] for _, encoded in passes]).cpu()
            scales = [encoded[j][1] for _, encoded in passes]
            if scales[0] is not None:
                tensors[f"{hook}.scale"] = torch.cat([s for s in scales if s is not None]).cpu()
        self.add_shard("contexts", tensors)

    def add_shard(self, form: str, tensors: dict[str, Tensor]) -> None:
        """Write a shard, and then list it."""
        listed = self.manifest.rows if form == "rows" else self.manifest.contexts
        path = self.folder / form / f"{len(listed):05d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_safetensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
        flush_to_disk(path)
        shard = Shard(str(path.relative_to(self.folder)), len(tensors["tokens"]), path.stat().st_size, sha256(path))
        listed.append(shard)

    def shuffle(self, stop: StopRequest) -> None:
        """Each bucket, shuffled, to a shard; then the bucket goes."""
        for b in tqdm(range(len(self.manifest.rows), self.n_buckets), desc="shuffling", unit="shard"):
            raw = np.fromfile(self.bucket(b), dtype=np.uint8) if self.bucket(b).exists() else np.empty(0, np.uint8)
            records = raw.reshape(-1, self.record_bytes)
            records = records[np.random.default_rng([self.cfg.seed, self.n_passes, b]).permutation(len(records))]
            del raw
            self.add_shard("rows", from_records(records, self.fields))
            self.manifest.save(self.folder)
            self.bucket(b).unlink(missing_ok=True)
            if stop.signal is not None:
                self.stop_here(stop)

    def cut_back(self) -> None:
        """Take from the disk what was written after the last commit; ValueError if more is gone."""
        for b, size in enumerate(self.manifest.progress["bucket_bytes"]):
            if b < len(self.manifest.rows):  # has become a shard
                continue
            found = self.bucket(b).stat().st_size if self.bucket(b).exists() else 0
            if found < size:
                raise ValueError(
                    f"{self.bucket(b)}: found {found} bytes, expected at least {size}; delete {self.folder} and write "
                    "the cache anew."
                )
            if found > size:
                with self.bucket(b).open("r+b") as file:
                    file.truncate(size)

    def bucket(self, b: int) -> Path:
        return self.folder / BUCKETS / f"{b:05d}.bin"

    def stop_here(self, stop: StopRequest) -> None:
        assert stop.signal is not None
        raise TrainingInterrupted(
            f"Stopped by {stop.signal.name}; the same command goes on with {self.folder}.",
            exit_code=128 + stop.signal,
        )


def tokens_state(store: ActivationsStore) -> dict[str, Any]:
    """The position in the text, in JSON."""
    state = store.tokens.state_dict()
    return json.loads(json.dumps(state | {"pending": state["pending"].tolist()}))


# ----------------------------------------------------------------------------------------------------------- records
# A row in a bucket: its token id, and of each hook the activations and, in int8, their scale.


def record_fields(sites: dict[str, int], dtype: str) -> list[tuple[str, torch.dtype, int]]:
    """(name, dtype, bytes) of what a record holds, in order."""
    stored = encode(torch.zeros(1, 1), dtype)[0].dtype
    found = [("tokens", torch.int32, 4)]
    for hook, width in sites.items():
        found.append((hook, stored, width * stored.itemsize))
        if dtype == "int8":
            found.append((f"{hook}.scale", torch.float32, 4))
    return found


def as_records(tokens: Tensor, encoded: list[tuple[Tensor, Tensor | None]]) -> np.ndarray:
    """(n, record_bytes) uint8 of `tokens` (prompts, context) and their activations at each hook."""
    parts = [tokens.flatten().to(torch.int32).unsqueeze(1)]
    for stored, scale in encoded:
        parts.append(stored.flatten(end_dim=1))
        if scale is not None:
            parts.append(scale.flatten().unsqueeze(1))
    return torch.cat([part.cpu().contiguous().view(torch.uint8) for part in parts], dim=1).numpy()


def from_records(records: np.ndarray, fields: list[tuple[str, torch.dtype, int]]) -> dict[str, Tensor]:
    """The inverse of `as_records`, by name."""
    found, first = {}, 0
    for name, dtype, n_bytes in fields:
        column = torch.empty(0, n_bytes // dtype.itemsize, dtype=dtype)
        if len(records):
            column = torch.from_numpy(np.ascontiguousarray(records[:, first : first + n_bytes])).view(dtype)
        found[name] = column.squeeze(1) if name == "tokens" or name.endswith(".scale") else column
        first += n_bytes
    return found
