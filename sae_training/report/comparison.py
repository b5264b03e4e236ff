"""What a run of several autoencoders leaves for comparing them: a table on the screen, and a page with a plot."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from sae_training.machine.files import write_text
from sae_training.report.curves import REPORT_FILE
from sae_training.report.page import document, plot, shown, style

Evaluations = Mapping[str, Mapping[str, float]]
"""By autoencoder, the keys of `evals.evaluate`."""

MOST_COLOURS = 10
COLUMNS = {
    "metrics/eval_explained_variance": ("explained variance", ".4f"),
    "metrics/eval_l0": ("L0", ".1f"),
    "metrics/CE_loss_score": ("CE score", ".4f"),
    "sparsity/dead_features": ("dead", ",.0f"),
    "metrics/eval_dead_fraction": ("silent", ".1%"),
}


def columns_of(evaluations: Evaluations) -> dict[str, tuple[str, str]]:
    """Those that there are figures for: few with evaluation off."""
    return {key: column for key, column in COLUMNS.items() if any(key in found for found in evaluations.values())}


def comparison_table(folder: Path, evaluations: Evaluations) -> str:
    """One line for each autoencoder, and where to find them."""
    width = max(map(len, evaluations), default=0)
    columns = columns_of(evaluations)
    lines = [" " * width + "".join(f"{title:>20}" for title, _ in columns.values())]
    for name, evaluation in evaluations.items():
        figures = [format(evaluation.get(key, math.nan), form) for key, (_, form) in columns.items()]
        lines.append(f"{name:<{width}}" + "".join(f"{figure:>20}" for figure in figures))
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"Run folder: {folder}, with a folder for each",
            f"Comparison: {folder / REPORT_FILE}",
            f"Curves:     python -m sae_training report {folder / next(iter(evaluations), '')}",
            "Load one in Python:",
            "  from sae_training.utils import LMSparseAutoencoderSessionloader",
            "  model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained("
            f"{str(folder / next(iter(evaluations), ''))!r})",
            "",
        ]
    )


def write_comparison(folder: Path, evaluations: Evaluations) -> Path:
    """Write report.html of a run of several: EV and CE score by L0 and, if they are of several layers, by layer."""
    columns = columns_of(evaluations)
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in columns.values())
    rows = []
    for name, evaluation in evaluations.items():
        cells = "".join(f"<td>{evaluation.get(key, math.nan):{form}}</td>" for key, (_, form) in columns.items())
        rows.append(f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>")
    table = f"<table><thead><tr><th>Autoencoder</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    shown_figures = {"metrics/eval_explained_variance": "Explained variance", "metrics/CE_loss_score": "CE score"}
    shown_figures = {key: title for key, title in shown_figures.items() if key in columns}
    figures = [frontier(evaluations, key, f"{title} by L0") for key, title in shown_figures.items()]
    if len({layer for _, layer in filter(None, map(of_layer, evaluations))}) > 1:
        figures = [*(by_layer(evaluations, key, f"{title} by layer") for key, title in shown_figures.items()), *figures]
    plots = "".join(plot(figure, f"plot-{n}") for n, figure in enumerate(figures))
    body = (
        f"<p class='note'>{shown(len(evaluations))} autoencoders, on held-out text. The training curves of one: "
        f"sae-training report {escape(str(folder))}/&lt;name&gt;</p>"
        f"<section class='plots'>{plots}</section><div class='table'>{table}</div>"
    )
    path = folder / REPORT_FILE
    write_text(path, document(folder.resolve().name, body, has_plots=True))
    return path


def frontier(evaluations: Evaluations, key: str, title: str) -> go.Figure:
    """A point for each autoencoder, its L0 across and the figure `key` upwards."""
    names = [name for name, evaluation in evaluations.items() if key in evaluation]
    # A colour each where a legend can still be read; the names are in any case where the pointer is.
    groups = [[name] for name in names] if len(names) <= MOST_COLOURS else [names]
    figure = go.Figure(
        [
            go.Scatter(
                x=[evaluations[name]["metrics/eval_l0"] for name in group],
                y=[evaluations[name][key] for name in group],
                text=group,
                name=group[0],
                mode="markers",
                marker={"size": 10},
                hovertemplate="%{text}<br>L0 %{x:.1f}<br>%{y:.4f}<extra></extra>",
            )
            for group in groups
        ]
    )
    style(figure, title, "active latents per token", "fraction")
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(exponentformat="none")
    return figure


def of_layer(name: str) -> tuple[str, int] | None:
    """An autoencoder's name without its layer, and the layer; None if the name has none."""
    match = re.fullmatch(r"(?:layer|blocks\.)(\d+)[-.]?(.*)", name)
    return (match.group(2), int(match.group(1))) if match else None


def by_layer(evaluations: Evaluations, key: str, title: str) -> go.Figure:
    """A line for each kind of autoencoder, the layer across and the figure `key` upwards."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for name, evaluation in evaluations.items():
        found = of_layer(name)
        if found is not None and key in evaluation:
            kind, layer = found
            lines[kind][layer] = evaluation[key]
    figure = go.Figure(
        [
            go.Scatter(x=sorted(values), y=[values[layer] for layer in sorted(values)], name=kind, mode="lines+markers")
            for kind, values in lines.items()
        ]
    )
    style(figure, title, "layer", "fraction")
    highest = max((layer for values in lines.values() for layer in values), default=0)
    figure.update_xaxes(dtick=1 + highest // 16)
    figure.update_yaxes(exponentformat="none")
    return figure
