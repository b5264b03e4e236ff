"""Exports of an analysis whose texts are hostile, read back as their readers do."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_analysis import DEAD, HOSTILE, PIECES, make_analysis
from sqlalchemy import update

from sae_analysis.analysis import Analysis, Example, open_analysis
from sae_analysis.export import PER_BATCH, all_examples, export, firing_examples
from sae_analysis.site.overview import COLUMNS
from sae_analysis.store import schema
from sae_analysis.store.read import engine_of


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return make_analysis(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def exported(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("exports")
    return lambda form: folder / form if (folder / form).exists() else export(analysis, folder / form, form)


def refused(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def lines_of(content: bytes) -> list[Any]:
    """Read lines of JSON that any reader takes: UTF-8, no NaN, and no sign at which some readers end a line."""
    text = content.decode("utf-8")
    assert text.endswith("\n")
    lines = text.splitlines()
    assert len(lines) == text.count("\n")
    return [json.loads(line, parse_constant=refused) for line in lines]


def texts_of(examples: list[Example]) -> list[list[str]]:
    return [example.tokens for example in examples]


def test_texts_are_as_hostile_as_they_were_made(analysis: Analysis) -> None:
    shown = {text for i in range(4) for example in all_examples(analysis.latent(i)) for text in example.tokens}
    for piece in HOSTILE:
        text = piece.decode(errors="replace")
        assert text in shown or "\ufffd" in text
    assert {"\ufffd\ufffd\ufffd", ""} <= shown  # a lone surrogate has three bytes, none of them a character


def test_parquet_holds_the_texts(exported: Callable[[str], Path], analysis: Analysis) -> None:
    table, examples = (pd.read_parquet(exported("parquet") / f"{name}.parquet") for name in ("latents", "examples"))
    for i in range(len(table)):
        expected = all_examples(analysis.latent(i))
        found = examples[examples["latent"] == i]
        assert [list(tokens) for tokens in found["tokens"]] == texts_of(expected)
        assert [list(ids) for ids in found["ids"]] == [example.ids for example in expected]
        assert found["activation"].tolist() == pytest.approx([example.activation for example in expected])
    expected_texts = [None if i == DEAD else analysis.token_text(i % len(PIECES)) for i in range(len(table))]
    assert [None if pd.isna(text) else text for text in table["top_token_text"]] == expected_texts
    assert table["count"].tolist() == analysis.latents["count"].tolist()
    assert set(COLUMNS) <= set(table.columns)


def test_jsonl_holds_the_texts(exported: Callable[[str], Path], analysis: Analysis) -> None:
    documents = lines_of((exported("jsonl") / "latents.jsonl").read_bytes())
    assert [document["index"] for document in documents] == list(range(len(analysis.latents)))
    assert len({document["_id"] for document in documents}) == len(documents)
    for document in documents:
        latent = analysis.latent(document["index"])
        expected = all_examples(latent)
        assert [example["tokens"] for example in document["examples"]] == texts_of(expected)
        assert [example["ids"] for example in document["examples"]] == [example.ids for example in expected]
        assert document["top_tokens"] == [list(pair) for pair in latent.top_tokens]
        assert document["logits"]["top"] == [list(pair) for pair in latent.logits["top"]]
        assert document["count"] == latent.count
        whole = {"index", "count", "first", "last", "top_token", "top_bigram_first", "top_bigram_second"}
        assert all(isinstance(document[name], int) for name in whole)
    assert documents[DEAD]["max"] is None


def test_neuronpedia_holds_the_texts(exported: Callable[[str], Path], analysis: Analysis) -> None:
    folder, about = exported("neuronpedia"), analysis.about
    names = ("release", "model", "sourceset", "source")
    (release,), (model,), (sourceset,), (source,) = (lines_of((folder / f"{n}.jsonl").read_bytes()) for n in names)
    assert release["name"] == sourceset["releaseName"] == about["name"]
    assert source == source | {"modelId": model["id"], "setName": sourceset["name"], "id": f"1-{about['name']}"}
    batches = {
        name: [
            [line for line in lines_of(gzip.decompress((folder / name / f"batch-{i}.jsonl.gz").read_bytes()))]
            for i in range(-(-len(analysis.latents) // PER_BATCH))
        ]
        for name in ("features", "activations")
    }
    features = [feature for batch in batches["features"] for feature in batch]
    assert [feature["index"] for feature in features] == [str(i) for i in range(len(analysis.latents))]
    activations = [activation for batch in batches["activations"] for activation in batch]
    for feature in features:
        latent = analysis.latent(int(feature["index"]))
        assert feature["modelId"] == model["id"] and feature["layer"] == source["id"]
        assert feature["pos_str"] == [text for text, _ in latent.logits["top"]]
        assert feature["neg_str"] == [text for text, _ in latent.logits["bottom"]]
        for name in ("freq_hist_data_bar", "logits_hist_data_bar"):
            assert len(feature[f"{name}_heights"]) == len(feature[f"{name}_values"])
        found = [activation for activation in activations if activation["index"] == feature["index"]]
        assert [activation["tokens"] for activation in found] == texts_of(firing_examples(latent))
        for activation in found:
            assert len(activation["tokens"]) == len(activation["values"])
            assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"] > 0


@pytest.mark.parametrize("form", ["parquet", "jsonl", "neuronpedia", "site"])
def test_figures_that_are_no_numbers_are_exported(form: str, tmp_path: Path) -> None:
    """An analysis in which no latent fires, and the logits of one are not finite."""
    analysis = make_analysis(tmp_path, 6)
    odd = {"counts": [1], "edges": [-math.inf, math.nan], "top": [[0, math.inf]], "bottom": [[1, math.nan]]}
    details = analysis.reader.details(2) | {"logits": odd}
    with engine_of(analysis.reader.url).begin() as connection:
        dead = {"max": None, "mean": None, "skew": None, "count": 0, "density": 0.0}
        connection.execute(update(schema.latents).values(dead))
        content = {"content": zlib.compress(json.dumps(details).encode())}
        connection.execute(update(schema.details).where(schema.details.c.latent == 2).values(content))
    export(open_analysis(tmp_path), tmp_path / "out", form)
    for path in (tmp_path / "out").rglob("*.jsonl*"):
        content = path.read_bytes()
        lines_of(gzip.decompress(content) if path.suffix == ".gz" else content)
