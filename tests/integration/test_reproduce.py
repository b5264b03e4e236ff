"""`sae-training reproduce`: the same run once more, to the same bits, or what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_training import cli
from sae_training.lm_runner import run_config


def edit(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def test_reproduced_runs_are_the_same_bits_and_others_say_what_differs(
    small_config: Callable, demo_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_config(small_config(k=[4, 8], architecture="topk", lr=0.001), demo_model).folder.path
    began = json.loads((run / "environment.json").read_text())
    assert began["threads"] == torch.get_num_threads()
    assert len(began["code"]["hash"]) == 12
    assert set(began["reads"]) == {"model_name", "dataset_path", "held-out text", "cached_activations_path"}
    capsys.readouterr()

    assert cli.main(["reproduce", str(run)]) == 0
    said = capsys.readouterr().out
    assert "Not as then" not in said
    assert f"Same bits: weights and rows of {run} and {run}-again." in said
    for member in ("k4", "k8"):
        for file in ("final/sae.safetensors", "metrics.jsonl"):
            assert (run / member / file).read_bytes() == (Path(f"{run}-again") / member / file).read_bytes()

    edit(run / "config.json", "config", "lr", value=0.002)
    edit(run / "environment.json", "processor", value="another")
    assert cli.main(["reproduce", str(run), "--run_name", "edited"]) == 1
    out, err = capsys.readouterr()
    assert "Not as then: processor" in out
    assert f"{run.parent}/edited is not {run}:" in err
    assert "k4: rows differ from row" in err
    assert "k8: final/sae.safetensors: W_enc differs in" in err
    assert "Perhaps because: processor" in err
    rate = next(row for row in map(json.loads, (run / "k4" / "metrics.jsonl").open()) if "losses/mse_loss" in row)
    assert f"step {rate['step']}: " in err  # nothing differs before the first step that logs its learning rate

    edit(run / "environment.json", "reads", "dataset_path", value="another text")
    assert cli.main(["reproduce", str(run), "--run_name", "refused"]) == 1
    said = capsys.readouterr().err
    assert "dataset_path: " in said and "has the fingerprint" in said
    assert not (run.parent / "refused").exists()


def test_run_that_is_not_finished_is_compared_as_far_as_it_came(
    small_config: Callable, demo_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_config(small_config(), demo_model).folder.path
    shutil.rmtree(run / "final")
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(rows[:5]) + rows[5][:9])  # as a kill leaves it
    capsys.readouterr()
    assert cli.main(["reproduce", str(run)]) == 0
    assert "Same bits: all rows that it has logged (it is not finished)" in capsys.readouterr().out
    assert cli.main(["reproduce", str(run), "--run_name", "run"]) == 1
    assert "the run's own; give the new run another" in capsys.readouterr().err
