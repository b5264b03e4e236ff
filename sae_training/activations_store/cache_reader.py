"""Reading activations from disk: what is checked before anything is read, and shards as one sequence read ahead.

open_cache --manifest agrees, sizes are right--> CachedShards --hashes are right--> CachedReader.take
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sae_training.activations_store.cache import FIELD_OF, MUST_AGREE, Manifest, Shard, from_stored, read_manifest
from sae_training.activations_store.finiteness import check_finite, explain_cached
from sae_training.activations_store.source import Taken
from sae_training.machine.files import sha256
from sae_training.machine.interrupt import StopAsked, stop_point
from sae_training.machine.paths import same_or_moved

READ_AHEAD = 2  # batches


def open_cache(folder: Path, expected: dict[str, Any], sites: dict[str, int]) -> CachedShards:
    """Open the shards of a complete cache that agrees with `expected` (MUST_AGREE) and holds `sites` (width by hook).

    Raise ValueError with all that differs, both values each. The sizes of files are checked here, their hashes by
    `CachedShards` before it reads them.
    """
    manifest = read_manifest(folder)
    name = f"cached_activations_path: {folder}"
    if not manifest.complete:
        raise ValueError(f"{name} is unfinished; run the same `cache` command again, which continues where it stopped.")
    if manifest.about["n_held_out"] < expected["n_held_out"]:
        raise ValueError(
            f"n_eval_batches: this run holds out {expected['n_held_out']} contexts (n_eval_batches * "
            f"store_batch_size), but {folder} was written with {manifest.about['n_held_out']} held out, so it contains "
            "some that this run is evaluated on; lower n_eval_batches, or write another cache."
        )
    different = [key for key in MUST_AGREE if not same_or_moved(manifest.about[key], expected[key])]
    if {"model_name", "lm_dtype", "load_in_8bit"} & {*different}:
        different = [key for key in different if key != "model_fingerprint"]  # because it differs only for that
    if different:
        lines = [
            f"{FIELD_OF.get(key, key)}: this run has {key.replace('_', ' ')} {expected[key]!r}, but {folder} was "
            f"written with {manifest.about[key]!r}"
            for key in different
        ]
        raise ValueError("\n".join(lines) + "; use the values of the cache, or write another one.")
    for hook, width in sites.items():
        if hook not in manifest.sites:
            raise ValueError(
                f"hook_point: {hook} is not in {folder}, which holds {', '.join(manifest.sites)}; choose one of them, "
                "or write another cache."
            )
        if manifest.sites[hook] != width:
            raise ValueError(f"d_in: {hook} is {width} wide, but {manifest.sites[hook]} in {folder}.")
    form = "rows" if manifest.rows else "contexts"
    shards = manifest.rows if form == "rows" else manifest.contexts
    for shard in shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "no such file" if size is None else f"{size} bytes"
            raise ValueError(f"{path}: found {found}, expected {shard.bytes} bytes; {rewrite_advice(folder)}")
    return CachedShards(folder, manifest, form, list(sites))


class CachedShards:
    """One form of a cache, as one long sequence of rows or contexts in memory-mapped files.

    A shard is read only after its hash has been checked. `check_ahead` checks all of them, at 1 to 2 GB/s.
    """

    def __init__(self, folder: Path, manifest: Manifest, form: str, hooks: list[str]) -> None:
        self.folder, self.manifest, self.form, self.hooks = folder, manifest, form, hooks
        self.shards = manifest.rows if form == "rows" else manifest.contexts
        self.n = sum(shard.n for shard in self.shards)
        self.has_scales = manifest.dtype == "int8"
        self.sound: set[str] = set()
        """The files whose hashes are right."""
        self.checking = {shard.file: threading.Lock() for shard in self.shards}
        self.explain = explain_cached(folder, manifest.about["lm_dtype"])
        self.damage: ValueError | OSError | None = None
        """What `check_ahead` has found wrong."""

    def fingerprint(self) -> str:
        """Return a hash that differs for any other cache, and for the other form of this one."""
        return hashlib.sha256(repr((self.form, self.shards)).encode()).hexdigest()[:16]

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return `tokens` and the activations of each hook from number `start` to `stop`, in order."""
        parts: list[dict[str, Tensor]] = []
        first = 0
        for shard in self.shards:
            begin, end = max(start, first), min(stop, first + shard.n)
            if begin < end:
                parts.append(self.read_shard(shard, begin - first, end - first))
            first += shard.n
        return concatenated(parts)

    def read_shard(self, shard: Shard, start: int, stop: int) -> dict[str, Tensor]:
        self.check(shard)
        with safe_open(self.folder / shard.file, framework="pt") as file:

            def part(name: str) -> Tensor:
                return file.get_slice(name)[start:stop]

            activations = {
                hook: from_stored(part(hook), part(f"{hook}.scale") if self.has_scales else None) for hook in self.hooks
            }
            if self.form == "rows":  # of contexts, only the positions that count must be finite (`Passes`)
                check_finite(activations, self.explain)
            return {"tokens": part("tokens").long(), **activations}

    def check(self, shard: Shard) -> None:
        """Raise ValueError if the content of the file is not what was written."""
        with self.checking.setdefault(shard.file, threading.Lock()):
            if shard.file in self.sound:
                return
            path = self.folder / shard.file
            if (found := sha256(path, between=stop_point)) != shard.sha256:
                raise ValueError(
                    f"{path}: found content of SHA-256 {found[:16]}, but {shard.sha256[:16]} was written; "
                    f"{rewrite_advice(self.folder)}"
                )
            self.sound.add(shard.file)

    def check_ahead(self) -> None:
        """Check every shard in a thread, so that damage anywhere is reported early in the run."""

        def check_all() -> None:
            try:
                for shard in self.shards:
                    self.check(shard)
            except (ValueError, OSError) as error:
                self.damage = error
            except StopAsked:
                pass  # said where the rows are taken

        threading.Thread(target=check_all, name="cache-check", daemon=True).start()


def rewrite_advice(folder: Path) -> str:
    """Say what to do about a damaged cache."""
    return f"delete {folder} and write the cache again."


def concatenated(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class CachedReader:
    """Takes rows (or contexts) of a cache in order, reading ahead in a thread; after the last comes the first again."""

    n_buffered = 0

    def __init__(self, shards: CachedShards, notify: Callable[[str], None]) -> None:
        self.shards = shards
        self.explain = shards.explain
        self.notify = notify
        self.position, self.epoch = 0, 0
        self.is_checking = False
        self.own: Callable[[Tensor], Tensor] | None = None
        """Returns of what is taken that which this process needs; None: all."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="cache-ahead")
        self.ahead: dict[tuple[int, int], Future[dict[str, Tensor]]] = {}

    def check_size(self, n: int) -> None:
        """Raise ValueError if `n` are more than the cache holds."""
        if n > self.shards.n:
            field = "train_batch_size" if self.shards.form == "rows" else "store_batch_size"
            raise ValueError(
                f"{field}: {n:,} {self.shards.form} are needed at once, but {self.shards.folder} holds "
                f"{self.shards.n:,}; lower it, or write a larger cache."
            )

    def remaining(self) -> int:
        return self.shards.n - self.position

    def take(self, n: int, n_left: int | None = None) -> Taken:
        self.check_size(n)
        if not self.is_checking:
            self.is_checking = True
            self.shards.check_ahead()
        if self.shards.damage is not None:
            raise self.shards.damage
        parts = [self.read(*place) for place in self.places(n)]
        self.position += n
        if self.position > self.shards.n:
            self.start_epoch()
        self.ahead = {
            place: self.ahead.get(place) or self.thread.submit(self.shards.read, *place)
            for place in self.places_ahead(n)
        }
        taken = concatenated(parts)
        return (taken if self.own is None else {name: self.own(of_all) for name, of_all in taken.items()}).__getitem__

    def sample(self, n: int) -> Taken:
        """Return up to `n` of the next rows or contexts, which are served all the same later."""
        return concatenated([self.shards.read(*place) for place in self.places(min(n, self.shards.n))]).__getitem__

    def places(self, n: int) -> list[tuple[int, int]]:
        """Return where the next `n` are, as (start, stop): one range, or two around the end."""
        end = min(self.position + n, self.shards.n)
        return [(start, stop) for start, stop in ((self.position, end), (0, self.position + n - end)) if start < stop]

    def places_ahead(self, n: int) -> Iterator[tuple[int, int]]:
        for start in range(self.position, self.position + READ_AHEAD * n, n):
            if start + n <= self.shards.n:
                yield start, start + n

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        waiting = self.ahead.pop((start, stop), None)
        return self.shards.read(start, stop) if waiting is None else waiting.result()

    def load_rows(self, part: dict[str, Any]) -> None:
        """Do nothing: no rows are kept in memory."""

    def start_epoch(self) -> None:
        if self.epoch == 0:
            self.notify_end("starting it again (not said for later epochs)")
        self.position -= self.shards.n
        self.epoch += 1

    def notify_end(self, what_now: str) -> None:
        self.notify(f"end of {self.shards.folder} after {self.shards.n:,} {self.shards.form}: {what_now}")

    def state_dict(self) -> dict[str, Any]:
        return {"cached": {"position": self.position, "epoch": self.epoch, "shards": self.shards.fingerprint()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        cached = state["cached"]
        if cached["shards"] != self.shards.fingerprint():
            raise ValueError(
                f"cached_activations_path: the run was started on other shards ({cached['shards']}) than "
                f"{self.shards.folder} holds now ({self.shards.fingerprint()}); give that cache, or begin a new run "
                'with resume="never".'
            )
        self.position, self.epoch = cached["position"], cached["epoch"]
        self.ahead.clear()
