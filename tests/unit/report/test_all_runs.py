"""What the page of all runs shows of run folders, whole, damaged, and while they are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_training.cli import main
from sae_training.machine.holder import this_process, write_holder
from sae_training.report.all_runs import MOST_POINTS, RunsRead, thinned
from sae_training.report.run_page import report_run
from sae_training.report.runs_page import watch_runs


def make_run(folder: Path, rows: list[dict[str, Any]], status: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": {}}))
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def row(step: int, **figures: float | None) -> dict[str, Any]:
    return {"step": step, "details/n_training_tokens": 64 * step} | {f"metrics/{k}": v for k, v in figures.items()}


def test_what_is_shown_of_runs(tmp_path: Path) -> None:
    """Members of a run of several are runs; a field that all have in common is not one that they differ in."""
    alerts = [{"step": 2, "kind": "loss", "message": "of b"}, {"step": 3, "kind": "disk", "message": "x", "name": "c"}]
    status = {"state": "training", "step": 2, "total_steps": 4, "failed": {"k16": "loss is NaN"}, "alerts": alerts}
    (tmp_path / "sweep").mkdir()
    many = tmp_path / "sweep" / "many"
    for k in (16, 32):
        make_run(many / f"k{k}", [row(2, l0=k)], k=k, architecture="topk", lr=3e-4)
    (many / "config.json").write_text(json.dumps({"config": {"k": [16, 32]}, "versions": {}}))
    (many / "status.json").write_text(json.dumps(status))
    write_holder(many, this_process("then"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "status.json").write_text('{"kind": "cache", "state": "finished"}')
    rows = [row(1, explained_variance=0.5), row(2, explained_variance=None), row(2, eval_explained_variance=0.123456)]
    make_run(tmp_path / "a", rows, {"state": "finished", "step": 2}, k=32, architecture="topk", run_name="a")
    data = RunsRead(tmp_path).look()
    assert data["common"] == {"architecture": "topk", "lr": "0.0003"}
    assert data["fields"] == ["k"]
    one, k16, k32 = data["runs"]
    assert [run["name"] for run in data["runs"]] == ["a", "sweep/many/k16", "sweep/many/k32"]
    assert [run["state"] for run in data["runs"]] == ["finished", "given up", "training"]
    assert one["lines"] == {
        "metrics/explained_variance": [[1, 2], [0.5, None]],
        "metrics/eval_explained_variance": [[2], [0.12346]],
    }
    assert one["figures"] == {"EV": 0.12346, "L0": None, "dead": None, "loss": None, "CE score": None}
    assert (one["tokens_per_step"], one["config"]) == (64, {"k": "32"})
    assert k16["problems"] == ["loss is NaN"]
    assert (k32["step"], k32["total"], k32["figures"]["L0"]) == (2, 4, 32)
    assert [alert["message"] for alert in k32["alerts"]] == ["of b"]  # the other is of another member


def test_a_run_is_read_on_while_it_is_written_and_from_the_start_once_it_was_cut_back(tmp_path: Path) -> None:
    file = make_run(tmp_path / "a", [row(1, l0=5.0)]) / "metrics.jsonl"
    runs = RunsRead(tmp_path)

    def line() -> list[list[float]]:
        return runs.look()["runs"][0]["lines"]["metrics/l0"]

    assert line() == [[1], [5]]
    with file.open("a") as log:
        log.write('{"step": 2, "metrics/l0": 6.0}\n{"step": 3, "metr')
    assert line() == [[1, 2], [5, 6]]
    with file.open("a") as log:
        log.write('ics/l0": 7.5}\n')
    assert line() == [[1, 2, 3], [5, 6, 7.5]]
    file.write_text('{"step": 1, "metrics/l0": 8.0}\n' * 9)  # longer, and another
    assert line() == [[1] * 9, [8] * 9]
    file.unlink()
    assert runs.look()["runs"][0]["lines"] == {}


def test_damaged_runs_are_listed_with_what_is_wrong(tmp_path: Path) -> None:
    make_run(tmp_path / "good", [row(1, l0=5.0)])
    bad = make_run(tmp_path / "bad", [row(1, l0=5.0)], {"state": "training"})
    (bad / "metrics.jsonl").write_bytes(b'{"step": 1, "metrics/l0": 4}\n\xff\xfe\n[1]\n{"step": 3, "metrics/l0": 6}\n')
    (bad / "config.json").write_text('{"config": {"k": ')
    (bad / "status.json").write_text("[]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 64}')  # that of a language model
    (tmp_path / "loop").symlink_to(tmp_path)
    page = report_run(tmp_path)
    assert page == tmp_path / "runs.html"
    found = RunsRead(tmp_path).look()["runs"]
    assert [run["name"] for run in found] == ["bad", "good"]
    assert found[0]["lines"]["metrics/l0"] == [[1, 3], [4, 6]]
    assert found[0]["problems"] == [
        "config.json: found text that is not JSON, expected what a run writes",
        "status.json: found list, expected an object of JSON",
        "metrics.jsonl, line 2: found text that is not a row of JSON; remove the line",
    ]
    assert found[1]["problems"] == []


def test_a_long_line_keeps_its_ends_and_its_spikes() -> None:
    steps, values = np.arange(10_000.0), np.ones(10_000)
    values[[17, 5003]] = [9.0, np.nan]
    values[7001] = -9.0
    kept, shown = thinned(steps, values)
    assert len(kept) <= MOST_POINTS
    assert {0, 17, 7001, 9999} <= set(kept)
    assert (shown.max(), shown.min()) == (9, -9)


def test_a_run_whose_process_has_gone_is_lost(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [row(1, l0=5.0)], {"state": "training", "started": "then"})
    write_holder(folder, this_process("then"))

    def state() -> str:
        return RunsRead(tmp_path).look()["runs"][0]["state"]

    assert state() == "training"
    write_holder(folder, replace(this_process("then"), start=0.5))  # a number that was given again
    assert state() == "lost"
    (folder / ".holder.json").unlink()
    assert state() == "lost"
    write_holder(folder, this_process("then"))
    (folder / "status.json").write_text('{"state": "interrupted", "started": "then"}')
    assert state() == "interrupted"
    write_holder(folder, this_process("now"))  # it goes on, and has not said so yet
    assert state() == "training"


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run, expected a run folder or a folder of runs (runs/)" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing"), "--watch"]) == 1
    assert "no such folder, expected a folder of runs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_last_data_are_in_the_page_once_watching_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(_: float) -> None:
        if (tmp_path / "late").exists():
            raise KeyboardInterrupt
        make_run(tmp_path / "late", [row(1, l0=5.0)], note="</script><b>")

    monkeypatch.setattr("time.sleep", sleep)
    told: list[str] = []
    watch_runs(tmp_path, told.append)
    assert told == [f"{tmp_path}/runs.html\nKept fresh every 5 s, also where it is open; Ctrl-C ends it."]
    for name in ("runs.html", "runs-data.js"):
        text = (tmp_path / name).read_text()
        assert '"late"' in text and '"every_s": null' in text and "</script><b>" not in text
