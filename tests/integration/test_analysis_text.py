"""Builds on another text than the run's own: which text the analysis says it is of, and texts that are hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from small import SMALL_RUN

from sae_analysis import build_analysis, open_analysis
from sae_analysis.analysis import Analysis
from sae_analysis.cli import main
from sae_analysis.export import all_examples, export
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import run_config

SENTENCES = ["The ocean was calm & <b>cold</b>.", "A treaty ended the labour dispute.", "Silver fell."] * 40
ODD = "</script><script>window.broken = true</script>\t\u202eabc שלום \u2028 λόγος 鲸 🐋 e\u0301 \x00\x07\x1b \x7f\x85"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_model: Any) -> Path:
    """A run on a split and a column that no other text has."""
    folder = tmp_path_factory.mktemp("run")
    rows = datasets.Dataset.from_dict({"body": SENTENCES * 4, "title": ["none"] * len(SENTENCES) * 4})
    datasets.DatasetDict({"kept": rows}).save_to_disk(str(folder / "own"))
    changes = {"dataset_path": str(folder / "own"), "dataset_split": "kept", "dataset_text_column": "body"}
    cfg = LanguageModelSAERunnerConfig(
        **{**SMALL_RUN, **changes, "architecture": "topk", "k": 8, "run_dir": str(folder)}
    )
    return run_config(cfg, demo_model).folder.path


def text_file(folder: Path) -> Path:
    path = folder / "my <text>.txt"
    path.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    return path


def rows_folder(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": SENTENCES}).save_to_disk(str(folder / "rows"))
    return folder / "rows"


def words_of(analysis: Analysis) -> str:
    """The texts of all contexts that examples are in."""
    found = {e.context: "".join(e.tokens) for i in range(40) for e in all_examples(analysis.latent(i))}
    return " ".join(found.values())


@pytest.mark.parametrize("make", [text_file, rows_folder])
def test_the_text_that_is_given_is_read_and_named(run: Path, make: Callable[[Path], Path], tmp_path: Path) -> None:
    text, out = make(tmp_path), tmp_path / "out"
    assert main(["build", str(run), "--tokens", "400", "--dataset", str(text), "--output", str(out)]) == 0
    analysis = open_analysis(out)
    assert analysis.about["text"] == str(text)
    assert str(text) in repr(analysis)
    assert "treaty ended" in words_of(analysis)
    page = analysis.latent(0).save_html(tmp_path / "page").read_text(encoding="utf-8")
    assert json.dumps(str(text)).replace("<", "\\u003c") in page
    about = (export(analysis, tmp_path / "site").parent / "data" / "about.js").read_text(encoding="utf-8")
    assert json.dumps(str(text)).replace("<", "\\u003c") in about


def test_the_text_of_the_run_is_named_where_no_other_is_given(run: Path, tmp_path: Path) -> None:
    analysis = build_analysis(run, 200, output=tmp_path / "out")
    assert isinstance(analysis, Analysis)
    assert analysis.about["text"] == str(run.parent / "own")


def test_rows_of_a_dataset_in_memory_are_read(run: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": SENTENCES})
    analysis = build_analysis(run, 200, dataset=rows, output=tmp_path / "out")
    assert isinstance(analysis, Analysis)
    assert "ocean" in words_of(analysis)
    assert analysis.about["text"] not in ("", str(run.parent / "own"))


def test_a_text_that_is_not_there_is_named(run: Path, tmp_path: Path, capsys: Any) -> None:
    there = text_file(tmp_path)
    for missing, hint in ((there.with_name("my <txt>.txt"), f"did you mean {str(there)!r}"), (tmp_path / "no", "no")):
        assert main(["build", str(run), "--dataset", str(missing), "--output", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert str(missing) in error
        assert hint in error
        assert "Traceback" not in error
    assert not (tmp_path / "out" / "analysis").exists()


def test_hostile_texts_survive_a_build_and_its_exports(run: Path, tmp_path: Path) -> None:
    """Signs of all kinds, and a line of a million letters without a space."""
    line = "".join(chr(97 + i * i % 23) for i in range(1_000_000))
    texts = [ODD * 20, "", "🐋" * 300, line]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    analysis = build_analysis(run, 5_000, dataset=path, output=tmp_path / "out")
    assert isinstance(analysis, Analysis)
    words = words_of(analysis)
    for part in ("<script>window.broken", "\u202eabc", "שלום", "\u2028", "λόγος", "🐋🐋", "\x00\x07\x1b", "\x7f"):
        assert part in words, part
    export(analysis, tmp_path / "site")
    for form in ("parquet", "jsonl", "neuronpedia"):
        export(analysis, tmp_path / form, form)
    expected = [example.tokens for i in range(len(analysis.latents)) for example in all_examples(analysis.latent(i))]
    table = pd.read_parquet(tmp_path / "parquet" / "examples.parquet")
    assert [list(tokens) for tokens in table["tokens"]] == expected
    lines = (tmp_path / "jsonl" / "latents.jsonl").read_text(encoding="utf-8").splitlines()
    assert [example["tokens"] for line in lines for example in json.loads(line)["examples"]] == expected
