"""What a run of several autoencoders leaves for comparing them: a table on the screen, and a page with plots."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sae_training.machine.files import write_text
from sae_training.machine.paths import command
from sae_training.machine.run_files import REPORT_FILE
from sae_training.report.all_runs import alerts
from sae_training.report.in_words import SCORE, is_figure, notes, notes_on_dead
from sae_training.report.page import Table, render, shown, style
from sae_training.report.summary import how_to_load

Evaluations = Mapping[str, Mapping[str, Any]]
"""What evaluation.json holds of each autoencoder, by its name."""

MOST_COLOURS = 10  # because the legend of more points cannot be read

COLUMNS = {
    "metrics/eval_explained_variance": ("explained variance", ".4f"),
    "metrics/eval_l0": ("L0", ".1f"),
    "metrics/CE_loss_score": ("CE score", ".4f"),
    "sparsity/dead_features": ("dead", ",.0f"),
    "metrics/eval_dead_fraction": ("silent", ".1%"),
}

PLOTTED = {"metrics/eval_explained_variance": "Explained variance", "metrics/CE_loss_score": "CE score"}


def table_of(evaluations: Evaluations) -> Table:
    """Return a row for each autoencoder, with the columns that any of them has: few where evaluation is off."""
    present = {key: column for key, column in COLUMNS.items() if any(key in found for found in evaluations.values())}
    rows = [
        (name, [cell(evaluation.get(key), form) for key, (_, form) in present.items()])
        for name, evaluation in evaluations.items()
    ]
    return Table("Autoencoder", [title for title, _ in present.values()], rows)


def cell(value: Any, form: str) -> str:
    """Return a figure in its form; a dash where there is none, or a word in its place."""
    return format(value, form) if is_figure(value) else "-"


def notes_of(evaluations: Evaluations) -> list[str]:
    """Return what goes with the figures: once for all where it is the same, by name where it is of one."""
    lines: dict[str, list[str]] = defaultdict(list)
    for name, evaluation in evaluations.items():
        score = evaluation.get(SCORE)
        why = [score.replace("no score", "No CE score", 1) + "."] if isinstance(score, str) else []
        for line in (*why, *notes(evaluation), *notes_on_dead(evaluation)):
            lines[line].append(name)
    return [line if len(names) == len(evaluations) else f"{', '.join(names)}: {line}" for line, names in lines.items()]


def comparison_table(folder: Path, evaluations: Evaluations) -> str:
    """Return one line for each autoencoder, and where to find them, for the screen."""
    table = table_of(evaluations)
    width = max(map(len, evaluations), default=0)
    lines = [f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells) for name, cells in table.rows]
    one = folder / next(iter(evaluations), "")
    return "\n".join(
        [
            "",
            " " * width + "".join(f"{title:>20}" for title in table.columns),
            *lines,
            "",
            *notes_of(evaluations),
            "",
            f"Run folder: {folder}, with a folder for each",
            f"Comparison: {folder / REPORT_FILE}",
            f"Curves:     {command('report', one)}",
            "Load one in Python:",
            *how_to_load(one),
            "",
        ]
    )


def write_comparison(folder: Path, evaluations: Evaluations) -> Path:
    """Write report.html of a run of several: EV and CE score by L0 and, if they are of several layers, by layer."""
    titles = {key: title for key, title in PLOTTED.items() if any(key in found for found in evaluations.values())}
    figures = [by_l0(evaluations, key, f"{title} by L0") for key, title in titles.items()]
    if len({layer for _, layer in filter(None, map(of_layer, evaluations))}) > 1:
        figures = [*(by_layer(evaluations, key, f"{title} by layer") for key, title in titles.items()), *figures]
    page = render(
        "comparison.html.j2",
        folder.resolve().name,
        figures,
        evaluation=table_of(evaluations),
        remarks=[*alerts(folder), *notes_of(evaluations)],
        note=f"{shown(len(evaluations))} autoencoders, on held-out text. The training curves of one: "
        f"{command('report', folder / next(iter(evaluations), 'NAME'))}",
    )
    path = folder / REPORT_FILE
    write_text(path, page)
    return path


def by_l0(evaluations: Evaluations, key: str, title: str) -> go.Figure:
    """Return a plot with a point for each autoencoder, its L0 across and the figure `key` upwards."""
    names = [name for name, evaluation in evaluations.items() if is_figure(evaluation.get(key))]
    # With one colour for all, the names are still where the pointer is.
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
    """Return an autoencoder's name without its layer, and the layer; None if the name has none."""
    match = re.fullmatch(r"(?:layer|blocks\.)(\d+)[-.]?(.*)", name)
    return (match.group(2), int(match.group(1))) if match else None


def by_layer(evaluations: Evaluations, key: str, title: str) -> go.Figure:
    """Return a plot with a line for each kind of autoencoder, the layer across and the figure `key` upwards."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for name, evaluation in evaluations.items():
        found = of_layer(name)
        if found is not None and is_figure(evaluation.get(key)):
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
