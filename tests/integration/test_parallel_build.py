"""Processes under torchrun that build one analysis: what one process builds, whatever stops them."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jobs import all_end_well, ranks
from small import SMALL_RUN

from sae_analysis import build_analysis
from sae_analysis.cli import main
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.fields import Source
from sae_training.lm_runner import run_config

PASS = 4096
N_TOKENS = 6 * PASS + 100  # 7 passes, so that processes have unequal numbers of them
TOPK = {"architecture": "topk", "k": 8, "exclude_special_tokens": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_model: Any) -> Path:
    cfg = LanguageModelSAERunnerConfig(**{**SMALL_RUN, **TOPK, "run_dir": str(tmp_path_factory.mktemp("run"))})
    return run_config(cfg, demo_model).folder.path


def words(run: Path, output: Path, **flags: Any) -> list[str]:
    return ["build", str(run), "--output", str(output), *(f"--{name}={value}" for name, value in flags.items())]


def content(output: Path) -> dict[str, Any]:
    """All rows of all tables, without the way from the folder to the run and back."""
    assert {path.name for path in (output / "analysis").iterdir()} == {"analysis.sqlite", "status.json"}
    connection = sqlite3.connect(output / "analysis" / "analysis.sqlite")
    names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
    found: dict[str, Any] = {name: sorted(connection.execute(f"select * from {name}")) for name in names}
    connection.close()
    ((*start, about),) = found["analyses"]
    facts = {name: value for name, value in json.loads(about).items() if name not in ("settings", "source")}
    return found | {"analyses": [*start, facts]}


@pytest.mark.slow
def test_a_stopped_build_of_two_processes_goes_on_with_three(run: Path, tmp_path: Path) -> None:
    build_analysis(run, N_TOKENS, effects=4, output=tmp_path / "alone")
    alone, folder = content(tmp_path / "alone"), tmp_path / "shared"
    command = words(run, folder, tokens=N_TOKENS, effects=4)
    job = ranks(2, tmp_path, *command, main=main)
    ids = folder / "analysis" / "building" / "contexts.i4"
    while not ids.is_file() or not ids.stat().st_size:
        assert job[0].poll() is None, job[0].communicate()
        time.sleep(0.02)
    job[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60) for process in job]
    assert [process.returncode for process in job] == [143, 143], said
    assert 0 < ids.stat().st_size < 4 * N_TOKENS
    job = ranks(3, tmp_path, *command, main=main)
    out = [process.communicate()[0] for process in job]
    all_end_well(job)
    assert "Going on after" in out[0] and "latents" in out[0] and out[1:] == ["", ""]
    assert content(folder) == alone


@pytest.mark.slow
def test_the_error_of_one_process_ends_all_and_a_cache_is_read_in_turns(
    run: Path, demo_model: Any, tmp_path: Path
) -> None:
    n_tokens = 2 * PASS + 100
    source = {name: value for name, value in {**SMALL_RUN, **TOPK}.items() if name in {f.name for f in fields(Source)}}
    cache = CacheActivationsRunnerConfig(
        **source, form="contexts", shard_size_mb=1, total_training_tokens=n_tokens,
        cached_activations_path=str(tmp_path / "cache"),
    )  # fmt: skip
    folder = cache_activations_runner(cache, demo_model)
    build_analysis(run, n_tokens, cached=folder, output=tmp_path / "alone")
    shard = folder / "contexts" / "00004.safetensors"  # of the second pass
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    command = words(run, tmp_path / "shared", tokens=n_tokens, cached=folder)
    job = ranks(2, tmp_path, *command, main=main)
    said = [process.communicate(timeout=60)[1] for process in job]
    assert [process.returncode for process in job] == [1, 1], said
    assert f"error: rank 1: {shard}: found content" in said[0] and f"error: {shard}: found content" in said[1]
    shard.write_bytes(sound)
    all_end_well(ranks(2, tmp_path, *command, main=main))
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
