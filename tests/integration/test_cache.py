"""Activations on disk: what is written, what training from them gives, kills, and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import run_job
from small import D_IN, SMALL_RUN
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache import DTYPES, from_stored, read_manifest, to_stored
from sae_training.activations_store.cache_buckets import Buckets
from sae_training.activations_store.cache_reader import CachedReader, CachedShards
from sae_training.activations_store.cache_writer import from_records
from sae_training.activations_store.open_source import ThenLive
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model
from sae_training.lm_runner import language_model_sae_runner, run_config
from sae_training.machine.lock import lock_beside
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.utils import LMSparseAutoencoderSessionloader

CACHE: dict[str, Any] = {
    name: SMALL_RUN[name]
    for name in ("model_name", "hook_point", "lm_dtype", "dataset_path", "context_size", "store_batch_size")
}
CACHE |= {"n_eval_batches": 1, "total_training_tokens": 40 * 64, "exclude_special_tokens": True}
HOOK = CACHE["hook_point"]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, demo_model: Any) -> Write:
    """Write a cache of 40 passes of 64 tokens."""

    def make(path: str = "cache", **changes: Any) -> Path:
        cfg = CacheActivationsRunnerConfig(**{**CACHE, "cached_activations_path": str(tmp_path / path), **changes})
        return cache_activations_runner(cfg, demo_model)

    return make


def everything(folder: Path, form: str, hooks: tuple[str, ...] = (HOOK,)) -> dict[str, Tensor]:
    shards = CachedShards(folder, read_manifest(folder), form, list(hooks))
    return shards.read(0, shards.n)


def live(demo_model: Any, small_config: Callable, n_passes: int, *hooks: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Tokens, activations at each hook, and the mask of what training keeps, of the first passes."""
    store = ActivationsStore(small_config(exclude_special_tokens=True), demo_model)
    sites = [ActivationsStore(small_config(hook_point=hook), demo_model).sites.input for hook in hooks]
    tokens = torch.cat([store.get_batch_tokens() for _ in range(n_passes)])
    parts = [harvest(demo_model, some, sites) for some in tokens.split(4)]
    return tokens, [torch.cat(of_hook) for of_hook in zip(*parts, strict=True)], store.keeps(tokens)


def sorted_rows(rows: Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, rows.tolist()))


def test_contexts_are_the_passes_as_they_were(write: Write, demo_model: Any, small_config: Callable) -> None:
    folder = write(form="contexts", shard_size_mb=1)
    manifest = read_manifest(folder)
    assert len(manifest.contexts) > 1 and not manifest.rows
    tokens, (activations,), _ = live(demo_model, small_config, 40, HOOK)
    found = everything(folder, "contexts")
    assert torch.equal(found["tokens"], tokens)
    assert torch.equal(found[HOOK], activations)


def test_rows_are_the_same_ones_shuffled_and_aligned(write: Write, demo_model: Any, small_config: Callable) -> None:
    other = "blocks.3.hook_resid_post"
    folder = write(form="rows", hook_point=[HOOK, other], shard_size_mb=1)
    assert len(read_manifest(folder).rows) > 3
    tokens, (first, second), keep = live(demo_model, small_config, 40, HOOK, other)
    found = everything(folder, "rows", (HOOK, other))
    expected = torch.cat([first[keep], second[keep], tokens[keep].unsqueeze(1)], dim=1)
    assert sorted_rows(torch.cat([found[HOOK], found[other], found["tokens"].unsqueeze(1)], dim=1)) == sorted_rows(
        expected
    )
    assert not torch.equal(found["tokens"], tokens[keep])
    assert not (folder / "buckets").exists()


def test_the_shuffle_is_global(write: Write, demo_model: Any, small_config: Callable) -> None:
    """A row's place says nothing about where in the text it was, and neighbours share a context as chance has it."""
    folder = write(form="rows", shard_size_mb=1, total_training_tokens=200 * 64)
    _, (activations,), keep = live(demo_model, small_config, 200, HOOK)
    keys = [row.numpy().tobytes() for row in activations[keep]]
    count = Counter(keys)  # the first words of two contexts can be the same
    context = torch.arange(len(keep)).unsqueeze(1).expand_as(keep)[keep]
    context = context[torch.tensor([count[key] == 1 for key in keys])]
    where = {key: i for i, key in enumerate(key for key in keys if count[key] == 1)}
    found = (row.numpy().tobytes() for row in everything(folder, "rows")[HOOK])
    origin = torch.tensor([where[key] for key in found if count[key] == 1])
    n = len(origin)
    assert n > 2500
    # Chi-square of an 8 x 8 table, eighths of the text by eighths of the cache: 49 degrees of freedom.
    cells = torch.histogramdd(
        torch.stack([origin, torch.arange(n)], dim=1).double(), bins=[8, 8], range=[0, n, 0, n]
    ).hist
    expected = n / 64
    chi_square = ((cells - expected) ** 2 / expected).sum().item()
    assert chi_square < 85.4  # a random order has more in 1 of 1000 cases
    same = (context[origin][1:] == context[origin][:-1]).sum().item()
    chance = n / len(keep) / n * (n - 1)  # each neighbour is one of the other 14 of a context's 15 rows
    assert same < chance + 4 * chance**0.5 + 4
    # The same measure knows an order that is not shuffled.
    assert (context[1:] == context[:-1]).sum().item() > 10 * chance


@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions(dtype: str, write: Write, demo_model: Any, small_config: Callable) -> None:
    folder = write(form="both", dtype=dtype)
    tokens, (activations,), keep = live(demo_model, small_config, 40, HOOK)
    found = everything(folder, "contexts")[HOOK].float()
    step = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}  # half a unit in the last place, relative
    if dtype == "int8":
        bound = activations.abs().amax(dim=-1, keepdim=True) / 127 * 0.501
    else:
        bound = activations.abs() * step[dtype] + 1e-7
    assert ((found - activations).abs() <= bound).all()
    assert sorted_rows(everything(folder, "rows")[HOOK].float()) == sorted_rows(found[keep])
    n_bytes = sum(path.stat().st_size for path in (folder / "rows").iterdir())
    width = {"float32": 4 * D_IN, "bfloat16": 2 * D_IN, "float16": 2 * D_IN, "int8": D_IN + 4}[dtype] + 4
    assert n_bytes == pytest.approx(width * int(keep.sum()), rel=0.02)


def test_rows_of_zeros_survive_int8() -> None:
    assert torch.equal(from_stored(*to_stored(torch.zeros(3, 5), "int8")), torch.zeros(3, 5))


# ----------------------------------------------------------------------------------------------------------- training


def weights_of(sae: SparseAutoencoder | dict[str, SparseAutoencoder]) -> list[Tensor]:
    assert isinstance(sae, SparseAutoencoder)
    return [weight.clone() for _, weight in sae.weights()]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", [True, "then_live"])
def test_training_from_contexts_is_training_live(
    mode: Any, write: Write, small_config: Callable, demo_model: Any
) -> None:
    """Bit for bit, also where the cache ends in the middle of the run and the language model takes over."""
    n_tokens = 40 * 64 if mode is True else 6 * 64
    folder = write(form="contexts", total_training_tokens=n_tokens)
    shared = {"exclude_special_tokens": True, "architecture": "topk"}
    cached = small_config(**shared, run_name="cached", use_cached_activations=mode, cached_activations_path=str(folder))
    from_cache = language_model_sae_runner(cached, demo_model)
    from_model = language_model_sae_runner(small_config(**shared, run_name="live"), demo_model)
    assert_equal(weights_of(from_cache), weights_of(from_model))


def test_rows_are_served_as_they_come_and_then_again(
    write: Write, small_config: Callable, demo_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(form="rows", total_training_tokens=4 * 64)
    cfg = small_config(exclude_special_tokens=True, use_cached_activations=True, cached_activations_path=str(folder))
    store = ActivationsStore(cfg, demo_model)
    rows = everything(folder, "rows")[HOOK]
    served = torch.cat([store.next_batch() for _ in range(6)])
    assert torch.equal(served, torch.cat([rows, rows])[: len(served)])
    assert "starting it again" in capsys.readouterr().out
    assert torch.equal(store.sample(10).x, torch.cat([rows, rows])[len(served) : len(served) + 10])


def test_after_its_rows_a_cache_is_followed_by_what_comes_next_in_the_text(
    write: Write, small_config: Callable, demo_model: Any
) -> None:
    folder = write(form="rows", total_training_tokens=4 * 64)
    changes = {"exclude_special_tokens": True, "cached_activations_path": str(folder)}
    store = ActivationsStore(small_config(**changes, use_cached_activations="then_live"), demo_model)
    for _ in range(4):
        store.next_batch()
    assert isinstance(store.source, ThenLive) and store.source.is_live
    tokens, _, _ = live(demo_model, small_config, 12, HOOK)
    other = ActivationsStore(small_config(exclude_special_tokens=True), demo_model)
    for _ in range(4):
        other.get_batch_tokens()
    assert torch.equal(store.next_batch(), [other.next_batch(), other.next_batch()][1])


def test_several_train_from_one_cache_and_the_session_needs_it_no_more(
    write: Write, small_config: Callable, demo_model: Any
) -> None:
    folder = write(form="rows", hook_point="blocks.{layer}.hook_resid_post", hook_point_layer=[0, 1, 2])
    changes = {"exclude_special_tokens": True, "use_cached_activations": True, "cached_activations_path": str(folder)}
    changes |= {"hook_point": "blocks.{layer}.hook_resid_post", "normalize_activations": "expected_average_only_in"}
    run = run_config(small_config(**changes, hook_point_layer=[0, 2], run_name="both"), demo_model)
    alone = language_model_sae_runner(small_config(**changes, hook_point_layer=2, run_name="alone"), demo_model)
    assert_equal(weights_of(run.saes["layer2"]), weights_of(alone))
    for path in folder.rglob("*.*"):
        path.unlink()
    _, _, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run.members[0].folder, model=demo_model)
    assert store.next_batch().shape == (64, D_IN)


# -------------------------------------------------------------------------------------------------------------- kills


def files(folder: Path) -> dict[str, bytes]:
    """What a cache leaves that does not tell the time."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "status.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_cache_killed_while_it_wrote_its_first_manifest_is_begun_again(tmp_path: Path, write: Write) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json.tmp").write_text('{"about": {')
    folder = write()
    assert read_manifest(folder).complete
    assert not (folder / "manifest.json.tmp").exists()


@pytest.mark.slow
def test_kills_while_a_cache_is_written_change_nothing(tmp_path: Path) -> None:
    changes = {"form": "both", "total_training_tokens": 100 * 64, "shard_size_mb": 1}

    def job(path: str) -> Callable[[], Path]:
        folder = {"cached_activations_path": str(tmp_path / path)}
        return partial(cache_activations_runner, CacheActivationsRunnerConfig(**{**CACHE, **changes, **folder}))

    whole = run_job(job("whole"), tmp_path / "whole")
    # Of what comes first, a quarter of the operations is left to each process; rows are made after all else.
    for where, n in (("manifest.json.tmp", 4), ("buckets", 4), ("contexts", 4), ("rows", 1)):
        assert whole[where] >= 2 * n, whole
        run_job(job("killed"), tmp_path / "killed", random.randint(1, whole[where] // n), where)
    run_job(job("killed"), tmp_path / "killed")
    one, other = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert one.keys() == other.keys()
    manifests = [json.loads(found.pop("manifest.json")) for found in (one, other)]
    assert manifests[0] == manifests[1]
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rows", "contexts"])
def test_kills_while_training_from_a_cache_change_nothing(form: str, write: Write, tmp_path: Path) -> None:
    folder = write(form=form)
    changes = {**SMALL_RUN, "exclude_special_tokens": True, "use_cached_activations": True, "architecture": "topk"}
    changes |= {"total_training_tokens": 50 * 64, "checkpoint_every_steps": 3, "cached_activations_path": str(folder)}

    def job(name: str) -> Callable[[], Any]:
        return partial(run_config, LanguageModelSAERunnerConfig(**{**changes, "run_dir": str(tmp_path / name)}))

    whole = run_job(job("whole"), tmp_path / "whole")
    for _ in range(2):  # at least a third of the operations is left to each process
        run_job(job("killed"), tmp_path / "killed", random.randint(1, whole[""] // 3))
    run_job(job("killed"), tmp_path / "killed")
    finals = [(tmp_path / name / "run" / "final" / "sae.safetensors").read_bytes() for name in ("whole", "killed")]
    assert finals[0] == finals[1]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_size": 8, "store_batch_size": 4}, "context_size: this run has context size 8, but .* with 16"),
        ({"exclude_special_tokens": False}, "exclude_special_tokens: this run has .* False, but .* True"),
        ({"prepend_bos": False}, "prepend_bos: this run has prepend bos False, but .* True"),
        (
            {"sequence_separator_token": 5},
            "sequence_separator_token: this run has sequence separator token 5, but .* 'auto'",
        ),
        ({"n_eval_batches": 2}, "n_eval_batches: this run holds out 8 contexts .* written with 4 held out"),
        ({"dataset_text_column": "text"}, "dataset_text_column: this run has dataset text column 'text', but .* None"),
        (
            {"hook_point": "blocks.2.hook_resid_post"},
            "hook_point: blocks.2.hook_resid_post is not in .* holds blocks.1",
        ),
    ],
)
def test_a_cache_of_something_else_is_refused(
    changes: dict[str, Any], message: str, write: Write, small_config: Callable, demo_model: Any
) -> None:
    folder = write()
    cached = {"exclude_special_tokens": True, "use_cached_activations": True, "cached_activations_path": str(folder)}
    with pytest.raises(ValueError, match=message):
        ActivationsStore(small_config(**{**cached, **changes}), demo_model)


def test_a_cache_from_before_there_was_a_choice_has_the_default(
    write: Write, small_config: Callable, demo_model: Any
) -> None:
    folder = write()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["about"]["sequence_separator_token"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cached = {"exclude_special_tokens": True, "use_cached_activations": True, "cached_activations_path": str(folder)}
    ActivationsStore(small_config(**cached), demo_model)
    with pytest.raises(ValueError, match="sequence_separator_token: this run has .* 'eos', but .* 'auto'"):
        ActivationsStore(small_config(**cached, sequence_separator_token="eos"), demo_model)


def test_a_cache_of_another_model_is_refused(write: Write, small_config: Callable, demo_model: Any) -> None:
    folder = write()
    cfg = small_config(exclude_special_tokens=True, use_cached_activations=True, cached_activations_path=str(folder))
    with torch.no_grad():
        demo_model.W_E[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="model_name: this run has model fingerprint '.*', but .* written with '"):
            ActivationsStore(cfg, demo_model)
    finally:
        with torch.no_grad():
            demo_model.W_E[0, 0] -= 1


def damage(folder: Path, how: str) -> None:
    shard = next((folder / "rows").iterdir())
    content = bytearray(shard.read_bytes())
    match how:
        case "truncated":
            shard.write_bytes(content[:-100])
        case "missing":
            shard.unlink()
        case "altered":
            content[-100] ^= 1
            shard.write_bytes(content)
        case "unfinished":
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
        case "other format":
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
        case "no manifest":
            (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"00000.safetensors: found \d+ bytes, expected \d+ bytes"),
        ("missing", "00000.safetensors: found no such file, expected"),
        ("altered", "00000.safetensors: found content of SHA-256"),
        ("unfinished", "is unfinished; run the same `cache` command again"),
        ("other format", "format 99, this version reads 1"),
        ("no manifest", "holds no manifest.json"),
    ],
)
def test_a_damaged_cache_is_refused(
    how: str, message: str, write: Write, small_config: Callable, demo_model: Any
) -> None:
    folder = write()
    damage(folder, how)
    cfg = small_config(exclude_special_tokens=True, use_cached_activations=True, cached_activations_path=str(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ActivationsStore(cfg, demo_model).next_batch()


def test_a_failed_write_is_not_committed(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, failed = Buckets.append, []

    def fails_once(self: Buckets, i: int, *rest: Any) -> None:
        if i == 20 and not failed:
            failed.append(i)
            raise OSError("no space left on device")
        real(self, i, *rest)

    monkeypatch.setattr(Buckets, "append", fails_once)
    with pytest.raises(OSError, match="no space"):
        write(shard_size_mb=1)
    write(shard_size_mb=1)
    assert files(tmp_path / "cache") == files(write("other", shard_size_mb=1))


def test_two_processes_do_not_write_to_one_folder(write: Write, tmp_path: Path) -> None:
    with (
        lock_beside(tmp_path / "cache", "x"),
        pytest.raises(OSError, match="^cached_activations_path: another"),
    ):
        write()


def test_a_run_goes_on_with_its_own_cache_only(write: Write, small_config: Callable, demo_model: Any) -> None:
    folder = write()
    changes = {"exclude_special_tokens": True, "use_cached_activations": True}
    store = ActivationsStore(small_config(**changes, cached_activations_path=str(folder)), demo_model)
    store.next_batch()
    other = ActivationsStore(small_config(**changes, cached_activations_path=str(write("other", seed=7))), demo_model)
    with pytest.raises(ValueError, match="the run was started on other shards"):
        other.load_state_dict(store.state_dict())


def test_a_sample_at_the_very_end_starts_again(write: Write, small_config: Callable, demo_model: Any) -> None:
    folder = write(form="rows", total_training_tokens=4 * 64, exclude_special_tokens=False)
    cfg = small_config(use_cached_activations=True, cached_activations_path=str(folder))
    store = ActivationsStore(cfg, demo_model)
    for _ in range(4):
        store.next_batch()
    assert torch.equal(store.sample(70).x, everything(folder, "rows")[HOOK][:70])


def test_float16_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="found an activation of 7e\\+04, expected at most 65504"):
        to_stored(torch.tensor([[7e4, 1.0]]), "float16")


def test_a_folder_of_something_else_is_left_alone(write: Write, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        write()
    assert os.listdir(tmp_path / "cache") == ["thesis.txt"]


def test_how_text_is_tokenised_is_no_other_config(write: Write) -> None:
    folder = write()
    with pytest.warns(FutureWarning, match="tokenizer_processes: no longer a field"):
        assert write(tokenizer_processes=0) == folder


def test_another_config_does_not_go_on_with_a_cache(write: Write) -> None:
    folder = write()
    before = files(folder)
    with pytest.raises(ValueError, match="another config:\n  seed: 42 -> 7"):
        write(seed=7)
    write()  # the same one finds it complete
    assert files(folder) == before
    assert replace(read_manifest(folder), complete=True) == read_manifest(folder)


def test_a_text_that_has_changed_since_is_refused(
    write: Write, small_config: Callable, demo_model: Any, tmp_path: Path
) -> None:
    text = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": f"chapter {i} of the book " * 9}) for i in range(300)]
    text.write_text("\n".join(lines) + "\n")
    folder = write(dataset_path=str(text))
    cfg = small_config(
        dataset_path=str(text),
        exclude_special_tokens=True,
        use_cached_activations=True,
        cached_activations_path=str(folder),
    )
    ActivationsStore(cfg, demo_model)
    text.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ValueError, match="cached_activations_path: .* was written from another text.*has changed"):
        ActivationsStore(cfg, demo_model)


def test_a_cache_and_its_text_may_move(write: Write, small_config: Callable, demo_model: Any, tmp_path: Path) -> None:
    text, there = tmp_path / "t.txt", tmp_path / "elsewhere" / "t.txt"
    text.write_text("a chapter of the book " * 9000)
    folder = write(dataset_path=str(text))
    there.parent.mkdir()
    shutil.move(text, there)
    cached = {"use_cached_activations": True, "cached_activations_path": str(folder), "dataset_path": str(there)}
    ActivationsStore(small_config(exclude_special_tokens=True, **cached), demo_model)
    assert write(dataset_path=str(there)) == folder, "the same command finds it complete"
    text.write_text("another book " * 9000)  # so that both are there, and nobody knows which is meant
    with pytest.raises(ValueError, match="dataset_path: this run has"):
        ActivationsStore(small_config(exclude_special_tokens=True, **cached), demo_model)


def test_all_that_differs_is_said_at_once(write: Write, small_config: Callable) -> None:
    cached = {"use_cached_activations": True, "cached_activations_path": str(write())}
    other = load_language_model("demo", lm_dtype="bfloat16")
    cfg = small_config(**cached, lm_dtype="bfloat16", exclude_special_tokens=False)
    with pytest.raises(ValueError) as caught:
        ActivationsStore(cfg, other)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("lm_dtype: this run has lm dtype 'bfloat16', but ")
    assert lines[0].endswith("was written with 'float32'")
    assert lines[1].startswith("exclude_special_tokens: this run has exclude special tokens False")
    assert len(lines) == 2  # the weights differ too, but only for that


def test_a_finished_cache_is_checked_and_its_damage_named(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(shard_size_mb=1)
    n_rows = sum(shard.n for shard in read_manifest(folder).rows)
    assert f"{n_rows:,} rows of 1 hook, float32, 0.00 GB" in "".join(capsys.readouterr())
    write(shard_size_mb=1)
    assert "is complete and undamaged" in "".join(capsys.readouterr())
    shard = folder / read_manifest(folder).rows[-1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard}: found content of SHA-256 .* was written; delete {folder}"):
        write(shard_size_mb=1)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard}: no such file; delete {folder}"):
        write(shard_size_mb=1)


def test_damaged_last_shard_is_reported_long_before_it_is_reached(write: Write) -> None:
    folder = write(shard_size_mb=1, total_training_tokens=60 * 64)
    manifest = read_manifest(folder)
    assert len(manifest.rows) > 2
    shard = folder / manifest.rows[-1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    reader = CachedReader(CachedShards(folder, manifest, "rows", [HOOK]), print)
    deadline = time.monotonic() + 60
    with pytest.raises(ValueError, match=f"{shard}: found content of SHA-256"):
        reader.take(2)  # raises already if the thread that checks is faster
        while reader.shards.damage is None and time.monotonic() < deadline:
            time.sleep(0.01)
        reader.take(2)
    assert reader.position <= 2


def test_a_batch_larger_than_the_cache_leaves_no_run(write: Write, small_config: Callable, demo_model: Any) -> None:
    cached = {"use_cached_activations": True, "cached_activations_path": str(write()), "exclude_special_tokens": True}
    changes = {"total_training_tokens": 9000, "n_batches_in_buffer": 300}
    with pytest.raises(ValueError, match=r"train_batch_size: 3,000 rows are needed at once, but .* holds 2,\d+"):
        language_model_sae_runner(small_config(**cached, **changes, train_batch_size=3000), demo_model)
    assert not (Path(small_config().run_dir) / "run").exists()
    language_model_sae_runner(small_config(**cached, **changes, train_batch_size=300), demo_model)


def test_a_rule_that_leaves_no_row_is_told(write: Write) -> None:
    with pytest.raises(ValueError, match="seqpos_slice, .* found no activation to keep in 40 passes .*; relax one"):
        write(seqpos_slice=(0, 1))


def test_a_bucket_may_be_empty(write: Write) -> None:
    folder = write(seqpos_slice=(0, 1), exclude_special_tokens=False, shard_size_mb=1, total_training_tokens=64 * 9)
    assert len(everything(folder, "rows")["tokens"]) == 36
    found = from_records(np.empty((0, 8), dtype=np.uint8), [("tokens", torch.int32, 4), ("hook", torch.float16, 4)])
    assert {name: tuple(column.shape) for name, column in found.items()} == {"tokens": (0,), "hook": (0, 2)}
