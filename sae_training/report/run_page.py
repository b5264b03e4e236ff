"""The page of a run, report.html: what was trained, its evaluation and its curves.

It reads the run's folder alone. metrics.jsonl is enough; config.json, status.json and final/evaluation.json add to the
page where they are there. The page can be written at any time, also while the run goes on or after it was killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from sae_training.machine.files import write_text
from sae_training.machine.phases import phase, say
from sae_training.machine.run_files import (
    EVALUATION_FILE,
    FINAL,
    METRICS_FILE,
    REPORT_FILE,
    RUN_CONFIG_FILE,
    STATUS_FILE,
    read_if_sound,
)
from sae_training.report.all_runs import alerts, is_run
from sae_training.report.comparison import write_comparison
from sae_training.report.curves import curve_figures, histogram_figures, is_number
from sae_training.report.in_words import BASE, notes, notes_on_dead, which_rows
from sae_training.report.metrics_file import LABELS, TOKENS_KEY, label, read_metrics
from sae_training.report.page import Table, render, shown
from sae_training.report.runs_page import watch_runs, write_runs_page

Row = Mapping[str, Any]


def report_run(path: str | Path, watch: bool = False) -> Path:
    """Write the page of what is in `path`, and return where it is.

    report.html has the curves of a run or, if that trained several autoencoders, compares them; runs.html has those of
    all runs in a folder, and of several that are still in training. `watch`: keep runs.html fresh until Ctrl-C.
    """
    if watch:
        return watch_runs(path, say)
    with phase("report"):
        return write_page_of(Path(path))


def write_page_of(path: Path) -> Path:
    if not is_run(path):
        return write_runs_page(path)
    if not any(path.glob(f"*/{METRICS_FILE}")):
        return write_report(path)
    evaluation = path / FINAL / EVALUATION_FILE
    if not evaluation.is_file():
        return write_runs_page(path)
    return write_comparison(path, json.loads(evaluation.read_text(encoding="utf-8")))


def write_report(run_folder: Path) -> Path:
    """Write `run_folder/report.html` and return its path; FileNotFoundError if it is no run folder."""
    run_folder = Path(run_folder)
    rows = read_metrics(run_folder)
    config, status = (read_if_sound(run_folder / name) for name in (RUN_CONFIG_FILE, STATUS_FILE))
    final = read_if_sound(run_folder / FINAL / EVALUATION_FILE)
    histograms = histogram_figures(rows)
    page = render(
        "run.html.j2",
        run_folder.resolve().name,
        [*histograms, *curve_figures(rows)],
        n_beside=len(histograms[:1]),
        facts=facts(config, status, rows),
        evaluation=evaluation_table(evaluations(run_folder, rows)),
        remarks=[*alerts(run_folder), *notes(final), *notes_on_dead(final)],
        note="" if rows else f"{METRICS_FILE} holds no rows: nothing has been logged yet.",
    )
    path = run_folder / REPORT_FILE
    write_text(path, page)
    return path


# ------------------------------------------------------------------------------------------------------------- facts


def facts(config: Mapping[str, Any], status: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """Return what the head of the page says, by label, without what is not known."""
    cfg = config.get("config", config)
    layer = cfg.get("hook_point_layer")
    d_in, factor = cfg.get("d_in"), cfg.get("expansion_factor")
    d_sae = cfg.get("d_sae", config.get("d_sae"))
    if d_sae is None and isinstance(d_in, int) and isinstance(factor, int):
        d_sae = d_in * factor
    sparse_by_k = "topk" in str(cfg.get("architecture")) or cfg.get("architecture") == "matryoshka"
    last = rows[-1] if rows else {}
    tokens = next((row[TOKENS_KEY] for row in reversed(rows) if TOKENS_KEY in row), None)
    found = {
        "Model": cfg.get("model_name"),
        "Model processing": cfg.get("model_processing"),
        "Hook point": with_layer(cfg.get("hook_point"), layer),
        "Predicts": with_layer(cfg.get("target_hook_point"), layer),
        "Head": cfg.get("hook_point_head_index"),
        "Dataset": mixture(cfg.get("dataset_path"), cfg.get("dataset_weights")),
        "Architecture": cfg.get("architecture"),
        "d_in": d_in,
        "d_sae": d_sae,
        "k" if sparse_by_k else "L1 coefficient": cfg.get("k" if sparse_by_k else "l1_coefficient"),
        "Learning rate": cfg.get("lr"),
        "Batch": cfg.get("train_batch_size"),
        "Context": cfg.get("context_size"),
        "Seed": cfg.get("seed"),
        "Rows": which_rows(cfg) if "exclude_special_tokens" in cfg else None,
        "Step": status.get("step", last.get("step")),
        "Tokens": share(status.get("n_training_tokens", tokens), cfg.get("total_training_tokens")),
        "Tokens/s": status.get("tokens_per_s"),
        "State": status.get("state"),
    }
    return {name: shown(value) for name, value in found.items() if value not in (None, "", [])}


def with_layer(hook: Any, layer: Any) -> Any:
    return hook.replace("{layer}", str(layer)) if isinstance(hook, str) and isinstance(layer, int) else hook


def mixture(paths: Any, weights: Any) -> Any:
    if not isinstance(paths, list):
        return paths
    return " + ".join(f"{weight:g} x {path}" for weight, path in zip(weights or [1] * len(paths), paths, strict=True))


def share(done: Any, total: Any) -> str | None:
    if done is None:
        return None
    return f"{shown(done)} of {shown(total)}" if total else shown(done)


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluations(run_folder: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return metrics by the folder in final/ that has them or, while there is none, the last that were logged."""
    files = sorted((run_folder / FINAL).glob(f"**/{EVALUATION_FILE}"))
    found = {file.parent.name: flat(read_if_sound(file)) for file in files}
    if any(found.values()):
        return found
    last: dict[str, Any] = {}
    for row in rows:
        last |= {
            key: value for key, value in row.items() if key.startswith(("metrics/", "sparsity/")) and is_number(value)
        }
    return {"last logged": last} if last else {}


def evaluation_table(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    metrics = [key for key in dict.fromkeys(chain(*columns.values())) if not key.startswith(BASE)]
    order = {name: place for place, name in enumerate(LABELS.values())}
    metrics.sort(key=lambda metric: order.get(label(metric), len(order)))
    rows = [(label(metric), [shown(values.get(metric, "")) for values in columns.values()]) for metric in metrics]
    return Table("Evaluation", list(columns), rows)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers and texts of nested dicts by "outer/inner" names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif is_number(value) or isinstance(value, str):
            found[prefix + key] = value
    return found
