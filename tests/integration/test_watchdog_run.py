"""A run whose text repeats: where it is said, that it is said once, and that saying it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_training import lm_runner
from sae_training.lm_runner import run_config
from sae_training.report.run_page import report_run

pytestmark = pytest.mark.usefixtures("clean_wandb")

SAID = "after step 2, the text has come to its end and starts again"


def test_what_is_wrong_is_said_once_and_everywhere(
    small_config: Callable, demo_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The whale swam by the ship, and the sailors looked at it. " * 12}) + "\n")
    cfg = small_config(dataset_path=str(text), eval_every_steps=0, n_eval_batches=0, log_to_wandb=True)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lm_runner, "finish", stop)
        patched.setattr(lm_runner, "due_now", lambda run, _: stop(run) if run.step == 9 else [])
        with pytest.raises(KeyboardInterrupt):
            run_config(small_config(**{**vars(cfg), "checkpoint_every_steps": 6}), demo_model)
    assert capsys.readouterr().out.count(SAID) == 1
    run = run_config(cfg, demo_model)
    out = capsys.readouterr().out
    assert "after step 6" in out and SAID not in out
    folder = run.folder.path
    alerts = json.loads((folder / "status.json").read_text())["alerts"]
    assert [(alert["step"], alert["kind"]) for alert in alerts] == [(2, "data")]
    assert f"Alert: {SAID}" in (folder / "report.html").read_text()
    assert alerts[0]["message"] in report_run(folder.parent).read_text()
    assert any(SAID.encode() in file.read_bytes() for file in folder.rglob("*.wandb"))
    assert "starts again" not in (folder / "metrics.jsonl").read_text()

    monkeypatch.setattr(lm_runner, "look_out", lambda run, shown: None)
    alone = run_config(small_config(**{**vars(cfg), "run_name": "alone", "log_to_wandb": False}), demo_model)
    one, other = (load_file(path / "final" / "sae.safetensors") for path in (folder, alone.folder.path))
    assert all(torch.equal(one[name], other[name]) for name in one)
