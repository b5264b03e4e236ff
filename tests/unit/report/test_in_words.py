from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from page_parser import Page

from sae_training.report.comparison import comparison_table, write_comparison
from sae_training.report.in_words import dead_window, rows_counted, to_record, which_rows, why_no_score
from sae_training.report.run_page import write_report
from sae_training.report.summary import summary

FIELDS = {
    "exclude_special_tokens": True,
    "seqpos_slice": (1, None),
    "max_activation_norm_multiple": None,
    "pack_sequences": True,
}
NOTHING = "no score: zeros in place of the activations change next to nothing (0.0010 nats per token, below 0.01)"


def losses(clean: float, with_sae: float, ablated: float) -> dict[str, float]:
    names = ("without_sae", "with_sae", "with_ablation")
    return {f"metrics/ce_loss_{name}": loss for name, loss in zip(names, (clean, with_sae, ablated), strict=True)} | {
        "base/ce_loss_by_chance": math.log(2048)
    }


def evaluation() -> dict[str, Any]:
    """What evaluation.json holds where the CE score means nothing and the run is worse than the mean."""
    figures = losses(4.0, 3.983, 4.001) | {"metrics/CE_loss_score": math.nan, "metrics/eval_explained_variance": -2.0}
    base = {"base/rows": 3_840, "base/positions": 4_096, "base/predicted_tokens": 4_064}
    return to_record(figures | {"metrics/eval_l0": 3.0} | base, FIELDS, ["it is broken; mend it"], "silent for long")


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (losses(4.0, 4.1, 7.0), None),
        (losses(4.0, 4.1, 4.02), None),
        (losses(4.0, 3.983, 4.001), NOTHING),
        (
            losses(4.0, 3.9, 3.95),
            "no score: zeros in place of the activations lower the loss, by 0.0500 nats per token",
        ),
        (losses(4.0, 4.0, 4.0), "lower the loss, by 0.0000"),
        (losses(7.9, 8.0, 8.5), "predicts no better than chance (7.90 nats per token, by chance 7.62)"),
        (losses(math.nan, 4.0, 4.0), "no score: a loss is not a number"),
        (losses(4.0, math.inf, 7.0), "no score: a loss is not a number"),
    ],
)
def test_score_is_left_out_where_ablation_changes_nothing(figures: dict[str, float], expected: str | None) -> None:
    found = why_no_score(figures)
    assert found is None if expected is None else expected in str(found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "all positions; special tokens such as BOS count"),
        ({"exclude_special_tokens": True}, "without special tokens such as BOS (exclude_special_tokens)"),
        ({"seqpos_slice": [None]}, "without positions outside [:] of each sequence"),
        (
            {"seqpos_slice": (-1, None)},
            "positions outside [-1:] of each sequence (seqpos_slice); special tokens such as",
        ),
        ({"max_activation_norm_multiple": 10.0, "exclude_special_tokens": True}, "more than 10 times the median norm"),
        ({"pack_sequences": False}, "without padding; special tokens such as BOS count"),
    ],
)
def test_which_rows_count_is_said_in_words(fields: dict[str, Any], expected: str) -> None:
    assert expected in which_rows(fields)


@pytest.mark.parametrize(
    ("tokens", "steps", "expected"),
    [
        (None, 2_000, "silent for the last 1,000 steps of training"),
        (None, 1_000, "silent for the last 1,000 steps: the run was no longer, so none can be"),
        (5_000, 100, "silent for the last 5,000 rows of training"),
        (50_000, 100, "silent for the last 50,000 rows: the run was no longer, so none can be"),
    ],
)
def test_dead_latents_are_those_of_a_window(tokens: int | None, steps: int, expected: str) -> None:
    fields = {"dead_feature_window": 1_000, "dead_feature_window_tokens": tokens, "tokens_per_step": 64}
    assert dead_window(fields, steps) == expected


def test_record_is_strict_json_and_says_what_counts() -> None:
    record = json.loads(json.dumps(evaluation(), allow_nan=False))
    assert record["metrics/CE_loss_score"] == NOTHING
    assert record["base/exclude_special_tokens"] is True
    assert record["base/seqpos_slice"] == [1, None]
    assert rows_counted(record) == (
        "3,840 rows of 4,096 held-out positions, without special tokens such as BOS (exclude_special_tokens), "
        "positions outside [1:] of each sequence (seqpos_slice)"
    )
    assert record["remarks"] == ["it is broken; mend it"]


def test_without_an_evaluation_nothing_is_said_of_rows() -> None:
    assert to_record({"sparsity/dead_features": 3}, FIELDS) == {"sparsity/dead_features": 3}


def test_summary_has_the_words_in_place_of_the_score(tmp_path: Path) -> None:
    text = summary(tmp_path, evaluation(), 512)
    assert f"  CE score                       -   {NOTHING}" in text.splitlines()
    assert "  Something is wrong: it is broken; mend it." in text.splitlines()
    assert "3,840 rows of 4,096 held-out positions, without special tokens" in text
    assert "CE and KL: 4,064 predicted tokens, special ones included" in text


def test_pages_have_the_words_too(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "evaluation.json").write_text(json.dumps(evaluation()))
    (tmp_path / "metrics.jsonl").touch()
    page = Page(write_report(tmp_path))
    assert page.table["CE score"] == [NOTHING]
    assert not [name for name in page.table if "base" in name or "rows" in name]
    assert "Something is wrong: it is broken; mend it." in page.texts["p"]
    assert "Dead latents: silent for long." in page.texts["p"]


def test_comparison_has_the_words_once_for_all_or_by_name(tmp_path: Path) -> None:
    sound = {key: value for key, value in evaluation().items() if key != "remarks"} | {"metrics/CE_loss_score": 0.9}
    both = {"k4": evaluation(), "k8": sound}
    text = comparison_table(tmp_path, both)
    assert f"k4: {NOTHING.replace('no score', 'No CE score')}." in text.splitlines()
    assert "k4: Something is wrong: it is broken; mend it." in text.splitlines()
    assert text.count("3,840 rows of 4,096") == 1
    page = Page(write_comparison(tmp_path, both))
    assert [cells[2] for cells in page.table.values()] == ["-", "0.9000"]
    assert [trace["name"] for trace in page.figures["CE score by L0"][0]] == ["k8"]
