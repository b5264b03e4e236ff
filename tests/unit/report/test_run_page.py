"""The report of small run folders, and what a browser shows of it where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from page_parser import Page

from sae_training.report.metrics_file import read_metrics
from sae_training.report.run_page import write_report
from sae_training.run.logger import RunLogger

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def make_run(folder: Path, n_rows: int = 3, suffixes: tuple[str, ...] = ("",)) -> Path:
    with RunLogger(folder, config={}) as logger:
        for number in range(n_rows):
            row = {}
            for suffix in suffixes:
                row |= {
                    f"losses/mse_loss{suffix}": 100.0 / 10**number,
                    f"losses/ghost_grad_loss{suffix}": 0.0,
                    f"metrics/explained_variance{suffix}": 0.9 - 2 * (number == 0),
                    f"metrics/l0{suffix}": 32.0,
                    f"sparsity/dead_features{suffix}": number,
                }
            logger.log(row, step=10 * number, tokens=640 * number)
    return folder


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def test_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    loading = [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    assert loading == []
    assert page.open == []


def test_report_is_written_in_the_run_folder_and_nothing_else_is(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_curve_has_steps_values_and_tokens(tmp_path: Path) -> None:
    traces, layout = Page(write_report(make_run(tmp_path))).figures["Losses"]
    (mse,) = traces
    assert mse["name"] == "mse loss"
    assert mse["x"] == [0, 10, 20]
    assert mse["y"] == [100.0, 10.0, 1.0]
    assert mse["customdata"] == ["0", "640", "1,280"]
    assert layout["yaxis"]["type"] == "log"


def test_curves_of_several_saes_share_a_plot(tmp_path: Path) -> None:
    folder = make_run(tmp_path, suffixes=("_layer3", "_layer7"))
    traces, _ = Page(write_report(folder)).figures["L0"]
    assert [trace["name"] for trace in traces] == ["layer3", "layer7"]


def test_held_out_curve_joins_the_one_of_training(tmp_path: Path) -> None:
    with RunLogger(tmp_path, config={}) as logger:
        logger.log({"metrics/l0": 40.0}, step=1, tokens=8)
        logger.log({"metrics/eval_l0": 41.0}, step=1, tokens=8)
    traces, _ = Page(write_report(tmp_path)).figures["L0"]
    assert [(trace["name"], trace["y"]) for trace in traces] == [("L0", [40.0]), ("held out", [41.0])]


def test_explained_variance_is_shown_from_zero(tmp_path: Path) -> None:
    _, layout = Page(write_report(make_run(tmp_path))).figures["Explained variance"]
    assert layout["yaxis"]["range"][0] == 0


def test_value_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    with RunLogger(tmp_path, config={}) as logger:
        for step, l0 in enumerate([1.0, float("nan"), 3.0]):
            logger.log({"metrics/l0": l0}, step=step, tokens=step)
    (trace,), _ = Page(write_report(tmp_path)).figures["L0"]
    assert trace["y"] == [1.0, None, 3.0]


def test_unknown_metric_gets_a_plot_of_its_own(tmp_path: Path) -> None:
    with RunLogger(tmp_path, config={}) as logger:
        logger.log({"metrics/something_new": 4.0}, step=1, tokens=8)
    (trace,), _ = Page(write_report(tmp_path)).figures["something new"]
    assert trace["y"] == [4.0]


def test_long_run_keeps_its_last_point(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(5000):
            file.write(f'{{"step": {step}, "metrics/l0": {step}.5}}\n')
    (trace,), _ = Page(write_report(tmp_path)).figures["L0"]
    assert len(trace["x"]) <= 2000
    assert (trace["x"][-1], trace["y"][-1]) == (4999, 4999.5)


def test_histogram_is_the_latest(tmp_path: Path) -> None:
    with RunLogger(tmp_path, config={}) as logger:
        logger.log_histogram("plots/feature_density_line_chart", torch.zeros(7), step=10)
        logger.log_histogram("plots/feature_density_line_chart", torch.zeros(9), step=20)
    ((bars,), _) = Page(write_report(tmp_path)).figures["Feature density at step 20"]
    assert sum(bars["y"]) == 9


def test_head_names_model_sizes_and_progress(tmp_path: Path) -> None:
    make_run(tmp_path)
    config = {
        "model_name": "<script>alert('x')</script> & co",
        "hook_point": "blocks.{layer}.hook_resid_post",
        "hook_point_layer": 8,
        "d_in": 576,
        "expansion_factor": 8,
        "architecture": "topk",
        "k": 32,
        "l1_coefficient": 0.001,
        "total_training_tokens": 2560,
    }
    write_json(tmp_path / "config.json", {"config": config, "versions": {"torch": "2"}})
    write_json(tmp_path / "status.json", {"step": 20, "n_training_tokens": 1280, "state": "training"})
    page = Page(write_report(tmp_path))
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts == {
        "Model": "<script>alert('x')</script> & co",
        "Hook point": "blocks.8.hook_resid_post",
        "Architecture": "topk",
        "d_in": "576",
        "d_sae": "4,608",
        "k": "32",
        "Step": "20",
        "Tokens": "1,280 of 2,560",
        "State": "training",
    }


def test_table_holds_the_final_evaluation(tmp_path: Path) -> None:
    make_run(tmp_path)
    values = {"metrics": {"l0": 31.5, "CE_loss_score": 0.9712345}, "n_tokens": 40960}
    write_json(tmp_path / "final" / "evaluation.json", values)
    table = Page(write_report(tmp_path)).table
    assert table == {"CE score": ["0.9712"], "L0": ["31.5"], "n tokens": ["40,960"]}


def test_table_falls_back_on_the_last_logged_values(tmp_path: Path) -> None:
    table = Page(write_report(make_run(tmp_path))).table
    assert table == {"Explained variance": ["0.9"], "L0": ["32"], "Dead latents": ["2"]}


def test_empty_metrics_are_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    page = Page(write_report(tmp_path))
    assert "nothing has been logged yet" in " ".join(page.texts["p"])


def test_damaged_extras_do_not_stop_the_report(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model_name": "cut of')
    (tmp_path / "status.json").write_text("[]")
    assert "Losses" in Page(write_report(tmp_path)).figures


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "losses/mse_l')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 10, 20]


def test_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: found text that is not JSON"):
        read_metrics(tmp_path)


def test_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_other_folder_is_refused(there: bool, tmp_path: Path) -> None:
    folder = tmp_path if there else tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="expected a run folder with metrics.jsonl"):
        write_report(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_browser_draws_every_plot(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    path = write_report(make_run(tmp_path))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=10000"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), profile, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    titles = re.findall(r'<text class="gtitle"[^>]*>([^<]*)</text>', done.stdout)
    assert titles == ["Losses", "Explained variance", "L0", "Dead latents"]
