"""A bad row far into the data of a run or a cache: what was trained or computed is saved, and the job goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import SMALL_RUN

from sae_training import cli
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.io import config_to_dict
from sae_training.formats.native import WEIGHTS_FILE
from sae_training.lm_runner import language_model_sae_runner
from sae_training.run.checkpoint import complete_checkpoints
from sae_training.text.row_values import BadData

WORDS = ("the", "whale", "ship", "captain", "sea", "storm", "of", "a", "harpoon", "under", "sails", "at", "dawn")
BAD_LINE = 125  # beyond the hundred rows that are looked at before the start
N_TOKENS = 80 * 64


def write(path: Path, bad: Any) -> Path:
    """About 7,000 tokens in rows of 20 words, with `bad` in line 125; a value of None leaves the line good."""
    shuffle = random.Random(0)
    rows: list[Any] = [" ".join(shuffle.choices(WORDS, k=20)) for _ in range(350)]
    if bad is not None:
        rows[BAD_LINE - 1] = bad
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def config(folder: Path, name: str, **changes: Any) -> LanguageModelSAERunnerConfig:
    own = {"dataset_path": str(folder / "text.jsonl"), "run_dir": str(folder / name), "streaming": True}
    return LanguageModelSAERunnerConfig(**{**SMALL_RUN, "total_training_tokens": N_TOKENS, **own, **changes})


def weights(folder: Path, name: str) -> bytes:
    return (folder / name / "run" / "final" / WEIGHTS_FILE).read_bytes()


def test_run_is_saved_at_a_bad_row_and_goes_on_once_it_is_mended(demo_model: Any, tmp_path: Path) -> None:
    write(tmp_path / "text.jsonl", None)
    language_model_sae_runner(config(tmp_path, "undisturbed"), demo_model)
    write(tmp_path / "text.jsonl", {"x": 1})
    with pytest.raises(BadData, match=r"text\.jsonl, line 125: column 'text' holds a dict") as caught:
        language_model_sae_runner(config(tmp_path, "stopped"), demo_model)
    (saved,) = complete_checkpoints(tmp_path / "stopped" / "run" / "checkpoints")
    (note,) = caught.value.__notes__
    assert str(saved) in note and "Step " in note and "the same command goes on from there" in note
    assert json.loads((tmp_path / "stopped" / "run" / "status.json").read_text())["step"] > 20
    write(tmp_path / "text.jsonl", None)
    language_model_sae_runner(config(tmp_path, "stopped"), demo_model)
    assert weights(tmp_path, "stopped") == weights(tmp_path, "undisturbed")


def test_stopped_run_goes_on_without_the_row(
    demo_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "text.jsonl", 5)
    language_model_sae_runner(config(tmp_path, "skipping", on_bad_rows="skip"), demo_model)
    said = capsys.readouterr()
    said = said.out + said.err
    assert "on_bad_rows: skipped text.jsonl, line 125: column 'text' holds a number (5)" in said
    assert f"on_bad_rows: 1 bad row of '{tmp_path}/text.jsonl' was skipped." in said
    with pytest.raises(BadData):
        language_model_sae_runner(config(tmp_path, "stopped"), demo_model)
    language_model_sae_runner(config(tmp_path, "stopped", on_bad_rows="skip"), demo_model)
    assert weights(tmp_path, "stopped") == weights(tmp_path, "skipping")


def test_command_line_says_what_is_bad_and_what_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_config: Callable[..., Any]
) -> None:
    write(tmp_path / "text.jsonl", ["fine", True])
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config_to_dict(config(tmp_path, "runs"))))
    assert cli.main(["train", "--config", str(file)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-2].endswith(
        f"error: dataset_path: '{tmp_path}/text.jsonl': text.jsonl, line 125: column 'text' holds a list of strings "
        "and truth values, expected a string or a list of strings; mend the row, or set on_bad_rows=skip to leave out "
        "rows like it"
    )
    assert lines[-1].startswith("Step ") and f"is saved in {tmp_path}/runs/run/checkpoints/step_" in lines[-1]


def test_cache_keeps_what_was_computed_before_a_bad_row(demo_model: Any, tmp_path: Path) -> None:
    def cache(name: str, **changes: Any) -> Path:
        names = ("model_name", "hook_point", "lm_dtype", "context_size", "store_batch_size", "n_eval_batches")
        fields = {field: SMALL_RUN[field] for field in names}
        text = {"dataset_path": str(tmp_path / "text.jsonl"), "streaming": True}
        path = {"cached_activations_path": str(tmp_path / name), "total_training_tokens": N_TOKENS}
        return cache_activations_runner(CacheActivationsRunnerConfig(**fields, **text, **path, **changes), demo_model)

    write(tmp_path / "text.jsonl", 5)
    with pytest.raises(BadData, match="line 125"):
        cache("stopped")
    manifest = json.loads((tmp_path / "stopped" / "manifest.json").read_text())
    assert manifest["progress"]["passes"] > 20
    whole, stopped = cache("whole", on_bad_rows="skip"), cache("stopped", on_bad_rows="skip")
    hashes = [
        [shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["rows"]]
        for folder in (whole, stopped)
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) > 0
