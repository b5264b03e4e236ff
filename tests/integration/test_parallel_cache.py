"""Processes under torchrun that write one cache: what one process writes, whatever stops them."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import all_end_well, ranks
from small import SMALL_RUN

from sae_training import cli
from sae_training.activations_store.cache import read_manifest
from sae_training.activations_store.cache_reader import CachedShards

HOOK = SMALL_RUN["hook_point"]
CACHE: dict[str, Any] = {
    "model_name": "demo", "dataset_path": "demo", "hook_point": HOOK, "lm_dtype": "float32", "context_size": 16,
    "store_batch_size": 4, "n_eval_batches": 1, "shard_size_mb": 1, "form": "both",
    "total_training_tokens": 150 * 64,
}  # fmt: skip


def arguments(folder: Path, **changes: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    fields = {**CACHE, "cached_activations_path": str(folder / "cache"), **changes}
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in fields.items()]
    return ["cache", *words]


def contexts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache" / "contexts").iterdir()}


def rows_of(folder: Path) -> list[tuple[float, ...]]:
    """Token and first activations of each row."""
    cache = folder / "cache"
    manifest = read_manifest(cache)
    assert manifest.complete and not (cache / "buckets").exists()
    shards = CachedShards(cache, manifest, "rows", [HOOK])
    everything = shards.read(0, shards.n)
    rows = torch.cat([everything["tokens"].unsqueeze(1).float(), everything[HOOK][:, :3].float()], dim=1)
    return [tuple(row) for row in rows.tolist()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(arguments(folder)) == 0
    assert len(contexts_of(folder)) > 4 and len(read_manifest(folder / "cache").rows) > 4
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "codes", "n_after"), [(signal.SIGKILL, [1, -9], 3), (signal.SIGTERM, [143, 143], 1), (None, [0, 0], 2)]
)
def test_processes_write_what_one_writes(
    number: signal.Signals | None, codes: list[int], n_after: int, alone: Path, tmp_path: Path
) -> None:
    words = arguments(tmp_path)
    job = ranks(2, tmp_path, *words)
    manifest = tmp_path / "cache" / "manifest.json"
    if number is not None:
        while not manifest.is_file() or not json.loads(manifest.read_text())["progress"]["passes"]:
            assert job[0].poll() is None, job[0].communicate()
            time.sleep(0.02)
        job[1].send_signal(number)
    said = [process.communicate(timeout=60) for process in job]
    assert [process.returncode for process in job] == codes, said
    assert said[1][0] == "" and "starting" not in said[1][1]  # the first speaks
    all_end_well(ranks(n_after, tmp_path, *words))  # what is finished is checked
    assert contexts_of(tmp_path) == contexts_of(alone)
    assert sorted(rows_of(tmp_path)) == sorted(rows_of(alone))  # in another order, from other files of the same buckets


def test_rows_alone_are_written_pass_by_pass(tmp_path: Path) -> None:
    words = arguments(tmp_path, form="rows", total_training_tokens=5 * 64)
    all_end_well(ranks(2, tmp_path, *words, "--parallel_timeout_minutes=5"))
    assert cli.main(words) == 0  # that is no part of the cache
    assert len(rows_of(tmp_path)) > 4 * 15 * 5 / 2
    assert cli.main([*arguments(tmp_path / "alone", form="rows", total_training_tokens=5 * 64)]) == 0
    assert sorted(rows_of(tmp_path)) == sorted(rows_of(tmp_path / "alone"))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")
def test_a_disk_that_is_full_on_one_process_ends_all_and_is_named(tmp_path: Path) -> None:
    job = ranks(2, tmp_path, *arguments(tmp_path, shard_size_mb=1))
    resource.prlimit(job[1].pid, resource.RLIMIT_FSIZE, (2**19, 2**19))  # half of a shard
    (_, first), (_, second) = (process.communicate(timeout=60) for process in job)
    assert [process.returncode for process in job] == [1, 1], first + second
    assert "error: rank 0: another process of the job has ended, whose own message says why" in first
    assert f"error: {tmp_path / 'cache'}" in second and "no space left for a file of that size" in second
    assert "This was rank 1, on " in second
