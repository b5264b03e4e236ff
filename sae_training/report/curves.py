"""Figures of the rows of metrics.jsonl: a plot of curves for each group of metrics, and the latest histograms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from sae_training.report.metrics_file import TOKENS_KEY, label
from sae_training.report.page import shown, style

Row = Mapping[str, Any]

MOST_POINTS = 2000  # of a curve, so that the page of a long run still opens at once

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


@dataclass(frozen=True)
class Panel:
    """A plot of every metric whose name matches; the legend shows what the pattern leaves of the name."""

    title: str
    pattern: str
    y_title: str
    log_scale: bool = False  # where no value is negative and they span a factor of ten
    from_zero: bool = False  # because the first steps often lie far below zero and would flatten the rest


PANELS = (
    Panel("Losses", r"^losses/", "loss", log_scale=True),
    Panel("Explained variance", r"^metrics/explained_variance(?!_std)_?", "fraction", from_zero=True),
    Panel("L0", r"^metrics/l0_?", "active latents per token", log_scale=True),
    Panel("Dead latents", r"^sparsity/(n_)?dead_features_?", "latents"),
    Panel("Cross-entropy loss", r"^metrics/ce_loss_", "nats per token"),
    Panel("CE score", r"^metrics/CE_loss_score_?", "fraction recovered", from_zero=True),
    Panel("KL divergence from the clean model", r"^metrics/kl_", "nats per token", log_scale=True),
    Panel("Rarely active latents", r"^sparsity/(?=below_1e)", "latents"),
    Panel("Learning rate", r"^details/current_learning_rate_?", "learning rate"),
)


def curve_figures(rows: Sequence[Row]) -> list[go.Figure]:
    """Return the panels in order, then one plot for each metric that belongs to none of them."""
    logged = dict.fromkeys(key for row in rows for key, value in row.items() if is_point(value))
    left = [name for name in logged if name not in ("step", TOKENS_KEY)]
    figures = []
    for panel in PANELS:
        names = [name for name in left if re.search(panel.pattern, name_in_training(name))]
        left = [name for name in left if name not in names]
        figures.append(curves(panel, names, rows))
    for name in left:
        panel = Panel(label(name), f"^{re.escape(name_in_training(name))}$", "")
        figures.append(curves(panel, [name], rows))
    return [figure for figure in figures if figure.data]


def curves(panel: Panel, names: Sequence[str], rows: Sequence[Row]) -> go.Figure:
    """Return the plot of a panel, with a curve for each of the metrics `names` by step."""
    figure = go.Figure()
    seen: list[float] = []
    for name in names:
        points = [row for row in rows if "step" in row and is_point(row.get(name, ""))]
        values = [row[name] for row in points if row[name] is not None]
        if not values or (panel.log_scale and not any(values)):
            continue  # a loss that is always 0 is one that the run does not use
        n_curves = len(list(figure.data))
        seen += values
        points = thinned(points)
        short = re.sub(panel.pattern, "", name_in_training(name)).replace("_", " ")
        origin = "held out " if name_in_training(name) != name else ""
        figure.add_scatter(
            x=[row["step"] for row in points],
            y=[row[name] for row in points],
            customdata=[shown(row.get(TOKENS_KEY, "?")) for row in points],
            name=(origin + short).strip() or panel.title,
            mode="lines+markers" if len(points) <= 30 else "lines",
            line={"color": COLOURS[n_curves % len(COLOURS)], "width": 1.8},
            marker={"size": 5},
            hovertemplate="%{y:.5g}  (step %{x:,}, %{customdata} tokens)",
        )
    style(figure, panel.title, "step", panel.y_title)
    figure.update_xaxes(rangemode="tozero", tickformat="~s")
    above = [value for value in seen if value > 0]
    if panel.log_scale and above and min(seen) >= 0 and max(above) > 10 * min(above):
        figure.update_yaxes(type="log", tickvals=log_ticks(min(above), max(above)), tickformat="~g")
    if seen and panel.from_zero and min(seen) < 0 < max(seen):
        figure.update_yaxes(range=[0, 1.05 * max(seen)])
    return figure


def name_in_training(name: str) -> str:
    """Return the name that a held-out metric has in training: metrics/l0 for metrics/eval_l0."""
    return name.replace("/eval_", "/")


def log_ticks(low: float, high: float) -> list[float]:
    digits = (1,) if high > 1000 * low else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**decade for decade in decades for digit in digits]


def thinned(points: Sequence[Row]) -> list[Row]:
    """Return at most MOST_POINTS of the points, evenly taken from the end: the last is the one people look for."""
    stride = -(-len(points) // MOST_POINTS) or 1
    return list(points[::-1][::stride][::-1])


def histogram_figures(rows: Sequence[Row]) -> list[go.Figure]:
    """Return the latest histogram under each key that has any, firing frequencies first."""
    latest: dict[str, tuple[Any, dict[str, Any]]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict) and {"counts", "edges"} <= value.keys():
                latest[key] = (row.get("step", "?"), value)
    figures = []
    for key in sorted(latest, key=lambda key: "activation_norm" in key):
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
                marker={"color": COLOURS[0], "line": {"width": 0}},
                hovertemplate=f"%{{y:,}} {counted} near %{{x:.3g}}<extra></extra>",
            )
        )
        style(figure, f"{label(key)} at step {shown(step)}", x_title, counted)
        figure.update_layout(bargap=0, hovermode="closest")
        figures.append(figure)
    return figures


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_point(value: Any) -> bool:
    return value is None or is_number(value)  # None stands for a value that was not finite: a gap in the curve
