"""The curves of a run as one HTML page that needs no network, made from what its folder holds.

Only metrics.jsonl is needed; config.json, status.json and final/evaluation.json add to the page when
they are there. The page can be written at any time, also while the run goes on or after it was killed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sae_training.machine.files import write_text
from sae_training.report.metrics_file import TOKENS_KEY, _label, read_metrics
from sae_training.report.page import _page, shown, style

REPORT_FILE = "report.html"


_MOST_POINTS = 2000  # per curve: a long run still makes a page that opens at once

_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


@dataclass(frozen=True)
class _Panel:
    """One plot, of every metric whose name matches; the legend leaves out what the pattern consumed."""

    title: str
    pattern: str
    y_title: str
    log_scale: bool = False  # where no value is negative and they span a factor of ten
    from_zero: bool = False  # the first steps often lie far below zero and would flatten the rest


_PANELS = (
    _Panel("Losses", r"^losses/", "loss", log_scale=True),
    _Panel("Explained variance", r"^metrics/explained_variance(?!_std)_?", "fraction", from_zero=True),
    _Panel("L0", r"^metrics/l0_?", "active latents per token", log_scale=True),
    _Panel("Dead latents", r"^sparsity/(n_)?dead_features_?", "latents"),
    _Panel("Cross-entropy loss", r"^metrics/ce_loss_", "nats per token"),
    _Panel("CE score", r"^metrics/CE_loss_score_?", "fraction recovered", from_zero=True),
    _Panel("KL divergence from the clean model", r"^metrics/kl_", "nats per token", log_scale=True),
    _Panel("Rarely active latents", r"^sparsity/(?=below_1e)", "latents"),
    _Panel("Learning rate", r"^details/current_learning_rate_?", "learning rate"),
)

# In the order in which the table shows them.


def write_report(run_folder: Path) -> Path:
    """Write `run_folder/report.html` and return its path; FileNotFoundError if it is no run folder."""
    run_folder = Path(run_folder)
    rows = read_metrics(run_folder)
    config = _read_json(run_folder / "config.json")
    status = _read_json(run_folder / "status.json")
    page = _page(
        run_folder.resolve().name,
        facts=_facts(config, status, rows),
        evaluation=_evaluation(run_folder, rows),
        curves=_curve_figures(rows),
        histograms=_histogram_figures(rows),
        n_rows=len(rows),
    )
    path = run_folder / REPORT_FILE
    write_text(path, page)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # an extra of the page, not worth failing for
    return values if isinstance(values, dict) else {}


HOOK_FIELDS = ("hook_point", "target_hook_point")


def _with_layer(hook: Any, layer: Any) -> Any:
    return hook.replace("{layer}", str(layer)) if isinstance(hook, str) and isinstance(layer, int) else hook


def _facts(config: Mapping[str, Any], status: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the head of the page says, by label; what is not known is left out."""
    cfg = config.get("config", config)
    hook, target = (_with_layer(cfg.get(name), cfg.get("hook_point_layer")) for name in HOOK_FIELDS)
    d_in, factor = cfg.get("d_in"), cfg.get("expansion_factor")
    d_sae = cfg.get("d_sae", config.get("d_sae"))
    if d_sae is None and isinstance(d_in, int) and isinstance(factor, int):
        d_sae = d_in * factor
    sparse_by_k = "topk" in str(cfg.get("architecture")) or cfg.get("architecture") == "matryoshka"
    last = rows[-1] if rows else {}
    tokens = next((row[TOKENS_KEY] for row in reversed(rows) if TOKENS_KEY in row), None)
    facts = {
        "Model": cfg.get("model_name"),
        "Hook point": hook,
        "Predicts": target,
        "Head": cfg.get("hook_point_head_index"),
        "Dataset": _mixture(cfg.get("dataset_path"), cfg.get("dataset_weights")),
        "Architecture": cfg.get("architecture"),
        "d_in": d_in,
        "d_sae": d_sae,
        "k" if sparse_by_k else "L1 coefficient": cfg.get("k" if sparse_by_k else "l1_coefficient"),
        "Learning rate": cfg.get("lr"),
        "Batch": cfg.get("train_batch_size"),
        "Context": cfg.get("context_size"),
        "Seed": cfg.get("seed"),
        "Step": status.get("step", last.get("step")),
        "Tokens": _of(status.get("n_training_tokens", tokens), cfg.get("total_training_tokens")),
        "Tokens/s": status.get("tokens_per_s"),
        "State": status.get("state"),
    }
    return {label: shown(value) for label, value in facts.items() if value not in (None, "", [])}


def _mixture(paths: Any, weights: Any) -> Any:
    if not isinstance(paths, list):
        return paths
    shares = weights or [1] * len(paths)
    return " + ".join(f"{share:g} x {path}" for share, path in zip(shares, paths, strict=True))


def _of(done: Any, total: Any) -> str | None:
    if done is None:
        return None
    return f"{shown(done)} of {shown(total)}" if total else shown(done)


def _evaluation(run_folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table as `{column: {metric: value}}`, from final/ or else the last values logged."""
    files = sorted((run_folder / "final").glob("**/evaluation.json"))
    columns = {file.parent.name: _flat(_read_json(file)) for file in files}
    if any(columns.values()):
        return columns
    last: dict[str, Any] = {}
    for row in rows:
        last |= {
            key: value for key, value in row.items() if key.startswith(("metrics/", "sparsity/")) and _is_number(value)
        }
    return {"last logged": last} if last else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif _is_number(value) or isinstance(value, str):
            flat[prefix + key] = value
    return flat


def _curve_figures(rows: Sequence[Mapping[str, Any]]) -> list[go.Figure]:
    """The known panels in order, then one plot for each metric that belongs to none of them."""
    names: dict[str, None] = {}  # keeps the order of first appearance
    for row in rows:
        names |= {key: None for key, value in row.items() if _is_point(value)}
    left = [name for name in names if name not in ("step", TOKENS_KEY)]
    figures = []
    for panel in _PANELS:
        members = [name for name in left if re.search(panel.pattern, _without_eval(name))]
        left = [name for name in left if name not in members]
        figures.append(_curves(panel, members, rows))
    for name in left:
        panel = _Panel(_label(name), f"^{re.escape(_without_eval(name))}$", "")
        figures.append(_curves(panel, [name], rows))
    return [figure for figure in figures if figure.data]


def _curves(panel: _Panel, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    figure = go.Figure()
    seen: list[float] = []
    for name in names:
        points = [row for row in rows if "step" in row and _is_point(row.get(name, ""))]
        values = [row[name] for row in points if row[name] is not None]
        if not values or (panel.log_scale and not any(values)):
            continue  # a loss that is always 0 is one that the run does not use
        n_curves = len(list(figure.data))
        seen += values
        points = _thinned(points)
        short = re.sub(panel.pattern, "", _without_eval(name)).replace("_", " ")
        origin = "held out " if _without_eval(name) != name else ""
        figure.add_scatter(
            x=[row["step"] for row in points],
            y=[row[name] for row in points],
            customdata=[shown(row.get(TOKENS_KEY, "?")) for row in points],
            name=(origin + short).strip() or panel.title,
            mode="lines+markers" if len(points) <= 30 else "lines",
            line={"color": _COLOURS[n_curves % len(_COLOURS)], "width": 1.8},
            marker={"size": 5},
            hovertemplate="%{y:.5g}  (step %{x:,}, %{customdata} tokens)",
        )
    style(figure, panel.title, "step", panel.y_title)
    figure.update_xaxes(rangemode="tozero", tickformat="~s")
    above = [value for value in seen if value > 0]
    if panel.log_scale and above and min(seen) >= 0 and max(above) > 10 * min(above):
        ticks = _log_ticks(min(above), max(above))
        figure.update_yaxes(type="log", tickvals=ticks, tickformat="~g")
    if seen and panel.from_zero and min(seen) < 0 < max(seen):
        figure.update_yaxes(range=[0, 1.05 * max(seen)])
    return figure


def _without_eval(name: str) -> str:
    """The metric's name in training: metrics/eval_l0 is metrics/l0 on held-out tokens."""
    return name.replace("/eval_", "/")


def _log_ticks(low: float, high: float) -> list[float]:
    digits = (1,) if high > 1000 * low else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**decade for decade in decades for digit in digits]


def _thinned(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    stride = -(-len(points) // _MOST_POINTS) or 1
    # Counted from the end: the last point is the one people look for.
    return list(points[::-1][::stride][::-1])


def _histogram_figures(rows: Sequence[Mapping[str, Any]]) -> list[go.Figure]:
    """The latest histogram under each key that has any."""
    latest: dict[str, tuple[Any, dict[str, Any]]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict) and {"counts", "edges"} <= value.keys():
                latest[key] = (row.get("step", "?"), value)
    figures = []
    for key in sorted(latest, key=lambda key: "activation_norm" in key):  # the firing frequencies first
        step, histogram = latest[key]
        edges, counts = histogram["edges"], histogram["counts"]
        norms = "activation_norm" in key
        counted = "activations" if norms else "latents"
        x_title = "L2 norm" if norms else "log10 of the firing frequency" if "feature_density" in key else ""
        figure = go.Figure(
            go.Bar(
                x=[(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)],
                y=counts,
                width=[high - low for low, high in zip(edges, edges[1:], strict=False)],
                marker={"color": _COLOURS[0], "line": {"width": 0}},
                hovertemplate=f"%{{y:,}} {counted} near %{{x:.3g}}<extra></extra>",
            )
        )
        style(figure, f"{_label(key)} at step {shown(step)}", x_title, counted)
        figure.update_layout(bargap=0, hovermode="closest")
        figures.append(figure)
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_point(value: Any) -> bool:
    return value is None or _is_number(value)  # None is a value that was not finite: a gap
