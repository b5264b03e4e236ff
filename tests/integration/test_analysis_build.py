"""An analysis of a small run: its figures, its examples, kills, other sources of activations, and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from killed import run_job
from processes import FORKS
from scipy import stats
from small import SMALL_RUN

from sae_analysis import build, build_analysis, corpus, open_analysis
from sae_analysis.analysis import Analysis
from sae_analysis.cli import main
from sae_analysis.export import export
from sae_analysis.places import name_of
from sae_analysis.store import write
from sae_analysis.subjects import check_positive
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import run_config
from sae_training.utils import LMSparseAutoencoderSessionloader

N_TOKENS = 3_000
TOPK = {"architecture": "topk", "k": 8, "exclude_special_tokens": True, "lr": 2e-3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("run")
    cfg = LanguageModelSAERunnerConfig(**{**SMALL_RUN, **TOPK, "run_dir": str(folder)})
    return run_config(cfg, demo_model).folder.path


@pytest.fixture(scope="module")
def built(run: Path) -> Analysis:
    found = build_analysis(run, N_TOKENS)
    assert isinstance(found, Analysis)
    return found


@pytest.fixture(scope="module")
def dense(run: Path, demo_model: Any) -> dict[str, np.ndarray]:
    """The same corpus with dense codes, in float64, from the formula of topk."""
    _, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run, model=demo_model)
    n = -(-N_TOKENS // sae.cfg.context_size)
    tokens = torch.cat([store.get_batch_tokens() for _ in range(-(-n // store.store_batch_size))])[:n]
    x = torch.cat([store.get_activations(part) for part in tokens.split(store.store_batch_size)]).double()
    W_enc, b_enc, b_dec = sae.W_enc.double(), sae.b_enc.double(), sae.b_dec.double()
    pre = (x - b_dec) @ W_enc + b_enc
    acts = torch.where(pre >= pre.topk(8, dim=-1).values[..., -1:], pre, 0).relu()
    keep = store.keeps(tokens)
    acts = torch.where(keep.unsqueeze(-1), acts, 0).detach()
    return {"acts": acts.numpy(), "keep": keep.numpy(), "tokens": tokens.numpy(), "W_dec": sae.W_dec.detach().numpy()}


def test_figures_are_those_of_a_dense_computation(built: Analysis, dense: dict[str, np.ndarray]) -> None:
    table, acts = built.latents, dense["acts"]
    n = dense["keep"].sum()
    assert built.about["n_counted"] == n
    assert (table["index"] == np.arange(acts.shape[-1])).all()
    counts = (acts > 0).sum(axis=(0, 1))
    assert (table["count"] == counts).all()
    fires = counts > 0
    with np.errstate(invalid="ignore"):
        values = np.where(acts > 0, acts, np.nan).reshape(-1, acts.shape[-1])[:, fires]
    expected = {
        "density": counts[fires] / n,
        "max": np.nanmax(values, axis=0),
        "mean": np.nanmean(values, axis=0),
        "mean_all": acts.sum(axis=(0, 1))[fires] / n,
        "variance": np.nanvar(values, axis=0),
    }
    for name, of_latents in expected.items():
        np.testing.assert_allclose(table[name][fires], of_latents, rtol=1e-5, atol=1e-9, err_msg=name)
    several = counts[fires] > 5
    np.testing.assert_allclose(
        table["skew"][fires][several], stats.skew(values, nan_policy="omit")[several], rtol=1e-4, atol=1e-5
    )
    assert table.loc[~fires, ["max", "mean", "variance"]].isna().all(axis=None)
    np.testing.assert_allclose(table["decoder_norm"], 1, rtol=1e-5)


def test_examples_are_where_the_corpus_has_them(built: Analysis, dense: dict[str, np.ndarray]) -> None:
    acts, tokens = dense["acts"], dense["tokens"]
    for index in (0, 17, 40):
        latent = built.latent(index)
        strongest = acts[..., index].max(axis=1)
        top = latent.examples("top")
        np.testing.assert_allclose([e.activation for e in top], np.sort(strongest[strongest > 0])[::-1][:20], rtol=1e-4)
        for example in [*top, *latent.examples("quantile"), *latent.examples("random"), *latent.examples("silent")]:
            assert example.ids == tokens[example.context].tolist()
            assert len(example.tokens) == len(example.ids)
            np.testing.assert_allclose(example.activations, acts[example.context, :, index], rtol=1e-4, atol=1e-5)
        assert all(acts[e.context, :, index].sum() == 0 for e in latent.examples("silent"))
        fifths = [e.kind for e in latent.examples("quantile")]
        assert fifths == sorted(fifths, reverse=True)


def test_a_second_build_with_the_same_settings_is_the_first(run: Path, built: Analysis, capfd: Any) -> None:
    path = run / "analysis" / "analysis.sqlite"
    before = path.stat().st_mtime_ns
    again = build_analysis(run, N_TOKENS)
    assert path.stat().st_mtime_ns == before
    assert isinstance(again, Analysis) and "there already" in "".join(capfd.readouterr())
    assert sorted(p.name for p in (run / "analysis").iterdir()) == ["analysis.sqlite", "status.json"]


def test_a_finished_analysis_is_not_replaced_by_one_with_other_settings(run: Path, built: Analysis) -> None:
    with pytest.raises(
        ValueError, match=r"holds a finished analysis with other settings:\n  n_contexts: 188 -> 13\n.*anew"
    ):
        build_analysis(run, 200)
    assert open_analysis(run).about["n_contexts"] == 188
    for effects, message in ((-5, "found -5"), ([3, 10**6], r"found latents \[1000000\]")):
        with pytest.raises(ValueError, match=message):
            build_analysis(run, N_TOKENS, effects=effects)


def content(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables."""
    connection = sqlite3.connect(path)
    names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
    found = {name: sorted(connection.execute(f"select * from {name}")) for name in names}
    connection.close()
    return found


def build_with_many_saves(run: Path, output: Path, kill_at_insert: int | None = None) -> None:
    """Build in small passes, saving after each, and writing few latents at a time; end the process in an insertion."""
    torch.set_num_threads(1)  # in each process, because sums round otherwise on another number of threads
    build.SAVE_EVERY, write.SLICE, corpus.PASS_TOKENS = 0.0, 64, 64
    insert, counted = write.Writer.insert, 0

    def counted_insert(*args: Any) -> None:
        nonlocal counted
        counted += 1
        if counted == kill_at_insert:
            os.kill(os.getpid(), signal.SIGKILL)
        insert(*args)

    setattr(write.Writer, "insert", counted_insert)  # noqa: B010
    build_analysis(run, N_TOKENS, output=output)


@pytest.mark.slow
def test_kills_change_nothing(run: Path, built: Analysis, tmp_path: Path) -> None:
    n_operations = run_job(partial(build_with_many_saves, run, tmp_path / "whole"), tmp_path / "whole")[""]
    assert n_operations > 40
    killed = partial(build_with_many_saves, run, tmp_path / "killed")
    for _ in range(2):  # at least a third of the operations is left to each process
        run_job(killed, tmp_path / "killed", random.randint(1, n_operations // 3))
    process = FORKS.Process(target=partial(killed, kill_at_insert=random.randint(2, 20)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="holds no analysis"):
        open_analysis(tmp_path / "killed")
    run_job(killed, tmp_path / "killed")
    one, other = (content(tmp_path / name / "analysis" / "analysis.sqlite") for name in ("whole", "killed"))
    assert one == other


def test_another_build_is_not_mixed_with_an_unfinished_one(run: Path, built: Analysis, tmp_path: Path) -> None:
    killed = partial(build_with_many_saves, run, tmp_path / "out", kill_at_insert=3)
    process = FORKS.Process(target=killed)
    process.start()
    process.join(300)
    with pytest.raises(ValueError, match=r"unfinished build with other settings:\n  n_contexts: 188 -> 13\n.*anew"):
        build_analysis(run, 200, output=tmp_path / "out")
    assert isinstance(found := build_analysis(run, 200, output=tmp_path / "out", anew=True), Analysis)
    assert found.about["n_contexts"] == 13


def test_batches_of_another_size_give_the_same_examples(run: Path, built: Analysis, demo_model: Any) -> None:
    model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run, model=demo_model)
    sae.cfg = dataclasses.replace(sae.cfg, store_batch_size=2, n_eval_batches=2)  # as many are held out
    other = build_analysis((model, sae, store), N_TOKENS, output=run.parent / "other")
    assert isinstance(other, Analysis)
    assert other.latents["count"].tolist() == built.latents["count"].tolist()
    for index in range(0, 60, 7):
        for kind in ("top", "random", "silent"):
            places = [[(e.context, e.position) for e in a.latent(index).examples(kind)] for a in (built, other)]
            assert places[0] == places[1]


def test_several_autoencoders_are_built_from_one_pass(small_config: Callable, demo_model: Any, tmp_path: Path) -> None:
    run = run_config(small_config(**TOPK | {"k": [4, 8]}), demo_model).folder.path
    found = build_analysis(run, 500)
    assert isinstance(found, dict) and list(found) == ["k4", "k8"]
    for name, k in (("k4", 4), ("k8", 8)):
        table = open_analysis(run / name).latents
        assert table["count"].sum() == k * found[name].about["n_counted"]
    with pytest.raises(FileNotFoundError, match="holds the analyses of 2 autoencoders; open one of"):
        open_analysis(run)


def test_checkpoints_and_files_get_a_place_of_their_own(
    run: Path, built: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "mine-LR-0.01"
    shutil.copytree(run / "final", copy)
    build_analysis(copy, 300)
    assert (tmp_path / "runs" / "mine-LR-0.01" / "analysis" / "analysis.sqlite").is_file()
    about = open_analysis("runs/mine-LR-0.01").about
    assert (about["name"], about["d_sae"]) == ("mine-LR-0.01", built.about["d_sae"])
    assert open_analysis(copy).about == about


def test_the_last_autoencoder_of_a_run_is_the_run(run: Path, built: Analysis) -> None:
    assert name_of(run / "final") == run.name
    assert open_analysis(run / "final").about == open_analysis(run).about == built.about


def test_names_are_without_the_ending_of_a_format(tmp_path: Path) -> None:
    (tmp_path / "blocks.3.hook-0.01").mkdir()
    for name in ("16384_blocks.2.hook_mlp_out.pkl.gz", "sae-LR-0.01.safetensors", "plain"):
        (tmp_path / name).touch()
    names = sorted(name_of(path) for path in tmp_path.iterdir())
    assert names == ["16384_blocks.2.hook_mlp_out", "blocks.3.hook-0.01", "plain", "sae-LR-0.01"]


def test_search_finds_tokens_and_texts(built: Analysis) -> None:
    found = built.search(tokens=" THE")
    assert len(found) > 0 and found["share"].is_monotonic_decreasing
    best = built.latent(found["index"].tolist()[0])
    assert any(text.strip().lower() == "the" for text, _ in best.top_tokens)
    some = built.latent(int(built.latents["count"].to_numpy().argmax())).examples("top")[0]
    piece = "".join(some.tokens[i] for i in some.window())[5:25]
    assert some.latent in built.search(text=piece.upper()).index
    assert len(built.search(text="no such text anywhere")) == 0 == len(built.search(tokens="nosuchtoken"))
    with pytest.raises(ValueError, match="give tokens or text"):
        built.search()
    for words in ({"text": ""}, {"tokens": ""}, {"tokens": []}, {"tokens": 5}, {"text": 5}):
        with pytest.raises(ValueError, match="expected words that are not empty"):
            built.search(**words)
    with pytest.raises(TypeError):
        built.latent(3.7)  # pyright: ignore


def test_exports_hold_every_latent_and_example(built: Analysis, tmp_path: Path) -> None:
    import gzip

    import pandas as pd

    n = built.about["d_sae"]
    export(built, tmp_path / "p", "parquet")
    table, examples = (pd.read_parquet(tmp_path / "p" / f"{name}.parquet") for name in ("latents", "examples"))
    assert len(table) == n and table["count"].tolist() == built.latents["count"].tolist()
    first = built.latent(0).examples("top")[0]
    row = examples[(examples["latent"] == 0) & (examples["kind"] == "top")].iloc[0]
    assert (row["position"], list(row["tokens"])) == (first.position, first.tokens)
    export(built, tmp_path / "j", "jsonl")
    lines = (tmp_path / "j" / "latents.jsonl").read_text().splitlines()
    assert len(lines) == n and json.loads(lines[7])["index"] == 7
    export(built, tmp_path / "n", "neuronpedia")
    with gzip.open(tmp_path / "n" / "features" / "batch-0.jsonl.gz", "rt") as file:
        features = [json.loads(line) for line in file]
    assert [f["index"] for f in features] == [str(i) for i in range(n)]
    assert len(features[0]["pos_str"]) == 10
    with gzip.open(tmp_path / "n" / "activations" / "batch-0.jsonl.gz", "rt") as file:
        for line in file:
            found = json.loads(line)
            assert len(found["tokens"]) == len(found["values"])
            assert found["values"][found["maxValueTokenIndex"]] == found["maxValue"] > 0


def test_errors_say_what_to_do(run: Path, built: Analysis, tmp_path: Path, capsys: Any) -> None:
    def error(*words: str) -> str:
        assert main(list(words)) == 1
        return capsys.readouterr().err

    assert "holds no analysis; build it with `sae-analysis build" in error("export", str(tmp_path), str(tmp_path / "x"))
    assert "no such" in error("build", str(tmp_path / "nowhere")).lower()
    assert "n_tokens: found 0" in error("build", str(run), "--tokens", "0")
    with pytest.raises(IndexError, match="latent: found"):
        built.latent(built.about["d_sae"])
    with pytest.raises(ValueError, match="kind: found 'best'"):
        built.latent(0).examples("best")
    broken = tmp_path / "analysis.sqlite"
    broken.write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match="holds no analysis"):
        open_analysis(broken)


def test_activations_that_may_be_negative_are_refused() -> None:
    sae = reference.loaded(reference.ROOT / "saelens-abstopk")
    with pytest.raises(ValueError, match="mine: architecture: found abstopk, whose activations may be below 0"):
        check_positive({"mine": sae})


def test_an_unfinished_or_newer_store_is_refused_by_name(built: Analysis, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    for change, message in (("complete = 0", "is unfinished"), ("schema_version = 99", "has schema version 99")):
        copy.write_bytes(Path(built.reader.url.removeprefix("sqlite:///")).read_bytes())
        connection = sqlite3.connect(copy)
        connection.execute(f"update analyses set {change}")
        connection.commit()
        connection.close()
        with pytest.raises(ValueError, match=message):
            open_analysis(copy)


def test_effects_are_those_of_leaving_a_latent_out(run: Path, built: Analysis, demo_model: Any) -> None:
    found = build_analysis(run, N_TOKENS, effects=[0, 40])
    assert isinstance(found, Analysis)
    assert found.latent(1).effects == []
    _, sae, _ = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run, model=demo_model)
    latent = found.latent(40)
    examples, effects = latent.examples("top"), latent.effects
    assert len(effects) == len(examples) > 3
    for example, effect in zip(examples[:4], effects, strict=False):
        ids = torch.tensor([example.ids])

        def leave_out(x: torch.Tensor, hook: Any, example: Any = example) -> torch.Tensor:
            x = x.clone()
            x[0, example.position] -= example.activation * sae.W_dec[40].detach()
            return x

        with torch.no_grad():
            clean = demo_model(ids, return_type="logits")[0, example.position].log_softmax(-1)
            hooks = [(SMALL_RUN["hook_point"], leave_out)]
            changed = demo_model.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits")[0, example.position]
        change = changed.log_softmax(-1) - clean
        if example.position + 1 < len(example.ids):
            assert effect.loss == pytest.approx(-change[example.ids[example.position + 1]].item(), abs=1e-4)
        else:
            assert effect.loss is None
        assert [value for _, value in effect.raised] == pytest.approx(change.topk(5).values.tolist(), abs=1e-4)
        assert [value for _, value in effect.lowered] == pytest.approx((-(-change).topk(5).values).tolist(), abs=1e-4)
