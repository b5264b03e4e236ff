"""TODO."""

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

from sae_training.activations_store.cache import FIELD_OF, MUST_AGREE, Manifest, Shard, anew, decode, read_manifest
from sae_training.machine.files import sha256

READ_AHEAD = 2  # batches

# ----------------------------------------------------------------------------------------------------------- checking


def open_cache(folder: Path, expected: dict[str, Any], sites: dict[str, int]) -> CachedShards:
    """The shards of a complete cache that agrees with `expected` (MUST_AGREE) and holds `sites` (width by hook).

    ValueError names all that differs, with both values. Sizes of files are checked here, hashes in `CachedShards`.
    """
    manifest = read_manifest(folder)
    name = f"cached_activations_path: {folder}"
    if not manifest.complete:
        raise ValueError(f"{name} is unfinished; run the same `cache` command again, which goes on where it stopped.")
    if manifest.about["n_held_out"] < expected["n_held_out"]:
        raise ValueError(
            f"n_eval_batches: this run holds out {expected['n_held_out']} contexts (n_eval_batches * "
            f"store_batch_size), but {folder} was written with {manifest.about['n_held_out']} held out, so it has some "
            "that this run is evaluated on; lower n_eval_batches, or write another cache."
        )
    different = [key for key in MUST_AGREE if manifest.about[key] != expected[key]]
    if {"model_name", "lm_dtype"} & {*different}:
        different = [key for key in different if key != "model_fingerprint"]  # which says no more
    if different:
        lines = [
            f"{FIELD_OF.get(key, key)}: this run has {key.replace('_', ' ')} {expected[key]!r}, but {folder} was "
            f"written with {manifest.about[key]!r}"
            for key in different
        ]
        raise ValueError("\n".join(lines) + "; give what it was written with, or write another cache.")
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
            raise ValueError(f"{path}: found {found}, expected {shard.bytes} bytes; {anew(folder)}")
    return CachedShards(folder, manifest, form, list(sites))


class CachedShards:
    """One form of a cache as one long sequence of rows, or of contexts, read from memory-mapped files.

    No shard is read before its hash has been found right; `check_ahead` does so for all of them, at 1 to 2 GB/s.
    """

    def __init__(self, folder: Path, manifest: Manifest, form: str, hooks: list[str]) -> None:
        self.folder, self.manifest, self.form, self.hooks = folder, manifest, form, hooks
        self.shards = manifest.rows if form == "rows" else manifest.contexts
        self.n = sum(shard.n for shard in self.shards)
        self.has_scales = manifest.dtype == "int8"
        self.sound: set[str] = set()
        self.checking = {shard.file: threading.Lock() for shard in self.shards}
        self.damage: ValueError | OSError | None = None
        """What `check_ahead` came upon."""

    def fingerprint(self) -> str:
        """A hash that tells it from any other cache, or form of this one."""
        return hashlib.sha256(repr((self.form, self.shards)).encode()).hexdigest()[:16]

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """`tokens` and the activations of each hook from number `start` to `stop`, in order."""
        parts: list[dict[str, Tensor]] = []
        first = 0
        for shard in self.shards:
            begin, end = max(start, first), min(stop, first + shard.n)
            if begin < end:
                parts.append(self.read_shard(shard, begin - first, end - first))
            first += shard.n
        return joined(parts)

    def read_shard(self, shard: Shard, start: int, stop: int) -> dict[str, Tensor]:
        self.check(shard)
        with safe_open(self.folder / shard.file, framework="pt") as file:

            def part(name: str) -> Tensor:
                return file.get_slice(name)[start:stop]

            found = {"tokens": part("tokens").long()}
            for hook in self.hooks:
                found[hook] = decode(part(hook), part(f"{hook}.scale") if self.has_scales else None)
        return found

    def check(self, shard: Shard) -> None:
        """ValueError if the file is not what was written."""
        with self.checking.setdefault(shard.file, threading.Lock()):
            if shard.file in self.sound:
                return
            path = self.folder / shard.file
            if (found := sha256(path)) != shard.sha256:
                raise ValueError(
                    f"{path}: found content of SHA-256 {found[:16]}, but {shard.sha256[:16]} was written; "
                    f"{anew(self.folder)}"
                )
            self.sound.add(shard.file)

    def check_ahead(self) -> None:
        """Check all shards, in a thread: of a damaged one a run should not hear at its end."""

        def check_all() -> None:
            try:
                for shard in self.shards:
                    self.check(shard)
            except (ValueError, OSError) as error:
                self.damage = error

        threading.Thread(target=check_all, name="cache-check", daemon=True).start()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class CachedReader:
    """Goes through cached shards, reading ahead in a thread; begins anew at their end, if it is asked to go on."""

    def __init__(self, shards: CachedShards, notify: Callable[[str], None]) -> None:
        self.shards = shards
        self.notify = notify
        self.position, self.epoch = 0, 0
        self.is_checking = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="cache-ahead")
        self.ahead: dict[tuple[int, int], Future[dict[str, Tensor]]] = {}

    def check_size(self, n: int) -> None:
        """ValueError if `n` are more than there are."""
        if n > self.shards.n:
            field = "train_batch_size" if self.shards.form == "rows" else "store_batch_size"
            raise ValueError(
                f"{field}: {n:,} {self.shards.form} are needed at once, but {self.shards.folder} holds "
                f"{self.shards.n:,}; lower it, or write a larger cache."
            )

    def remaining(self) -> int:
        return self.shards.n - self.position

    def take(self, n: int) -> dict[str, Tensor]:
        """The next `n` rows or contexts, those after the last being the first."""
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
        return joined(parts)

    def peek(self, n: int) -> dict[str, Tensor]:
        """Up to `n` of what comes next, without going on."""
        return joined([self.shards.read(*place) for place in self.places(min(n, self.shards.n))])

    def places(self, n: int) -> list[tuple[int, int]]:
        """Where the next `n` are, in one stretch or, around the end, in two: (first, one after the last)."""
        end = min(self.position + n, self.shards.n)
        return [(start, stop) for start, stop in ((self.position, end), (0, self.position + n - end)) if start < stop]

    def places_ahead(self, n: int) -> Iterator[tuple[int, int]]:
        for start in range(self.position, self.position + READ_AHEAD * n, n):
            if start + n <= self.shards.n:
                yield start, start + n

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        waiting = self.ahead.pop((start, stop), None)
        return self.shards.read(start, stop) if waiting is None else waiting.result()

    def start_epoch(self) -> None:
        if self.epoch == 0:
            self.notify_end("starting it again (not said for later epochs)")
        self.position -= self.shards.n
        self.epoch += 1

    def notify_end(self, what_now: str) -> None:
        self.notify(f"end of {self.shards.folder} after {self.shards.n:,} {self.shards.form}: {what_now}")

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "epoch": self.epoch, "shards": self.shards.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["shards"] != self.shards.fingerprint():
            raise ValueError(
                f"cached_activations_path: the run was begun on other shards ({state['shards']}) than "
                f"{self.shards.folder} holds now ({self.shards.fingerprint()}); give that cache, or begin anew with "
                'resume="never".'
            )
        self.position, self.epoch = state["position"], state["epoch"]
        self.ahead.clear()
