"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sae_training.report.metrics_file import _LABELS, METRICS_FILE, _label


def style(figure: go.Figure, title: str, x_title: str, y_title: str) -> None:
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "container", "xanchor": "left", "font": {"size": 15}},
        template="plotly_white",
        height=320,
        margin={"l": 64, "r": 16, "t": 44, "b": 44},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#374151"},
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
        showlegend=len(list(figure.data)) > 1,
    )
    figure.update_xaxes(title={"text": x_title, "standoff": 4})
    figure.update_yaxes(title={"text": y_title, "standoff": 6}, exponentformat="e")


def _page(
    name: str,
    *,
    facts: Mapping[str, str],
    evaluation: Mapping[str, Mapping[str, Any]],
    curves: Sequence[go.Figure],
    histograms: Sequence[go.Figure],
    n_rows: int,
) -> str:
    head = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in facts.items())
    plots = [plot(figure, f"plot-{n}") for n, figure in enumerate([*histograms, *curves])]
    # The table is narrow: the first histogram, where there is one, fills the space beside it.
    beside, plots = plots[: len(histograms[:1])], plots[len(histograms[:1]) :]
    nothing = f"<p class='note'>{METRICS_FILE} holds no rows: nothing has been logged yet.</p>"
    body = f"""<dl>{head}</dl>
<section class="plots">{_table(evaluation)}{"".join(beside)}</section>
<section class="plots">{"".join(plots)}</section>
{nothing if n_rows == 0 else ""}"""
    return document(name, body, has_plots=bool(beside or plots))


def document(name: str, body: str, has_plots: bool) -> str:
    """A page that needs no network, with `body` (HTML) under its name."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title>
<style>{_CSS}</style>
{f"<script>{get_plotlyjs()}</script>" if has_plots else ""}
</head>
<body>
<main>
<h1>{escape(name)}</h1>
{body}
</main>
</body>
</html>
"""


def plot(figure: go.Figure, div_id: str) -> str:
    """The figure as an element of a page."""
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=div_id,
        config={
            "displaylogo": False,
            "responsive": True,
            "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        },
    )
    return f'<div class="plot">{drawn}</div>'


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    if not columns:
        return ""
    metrics = list(dict.fromkeys(key for values in columns.values() for key in values))
    order = {label: place for place, label in enumerate(_LABELS.values())}
    metrics.sort(key=lambda metric: order.get(_label(metric), len(order)))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(_label(metric))}</th>"
        + "".join(f"<td>{escape(shown(values.get(metric, '')))}</td>" for values in columns.values())
        + "</tr>"
        for metric in metrics
    )
    table = f"<table><thead><tr><th>Evaluation</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>'


def shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, float) and value.is_integer() and 1e3 <= abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


_CSS = """
:root { color: #111827; background: #f9fafb; }
body { margin: 0; font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 22px; margin: 0 0 16px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px 24px;
  margin: 0 0 24px; }
dl div { min-width: 0; }
dt { color: #6b7280; font-size: 12px; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  margin-bottom: 16px; align-items: start; }
.plot, .table { background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; min-width: 0; }
.plot { padding: 10px 10px 4px; }
.table { padding: 12px 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 3px 0 3px 20px; text-align: right; }
tr + tr > *, tbody > tr > * { border-top: 1px solid #f0f1f3; }
th { font-weight: 400; color: #4b5563; }
thead th { color: #6b7280; font-size: 12px; }
tbody th, thead th:first-child { text-align: left; padding-left: 0; }
thead th:first-child { font: 15px system-ui, sans-serif; color: #374151; }
.note { color: #6b7280; }
@media (max-width: 900px) { .plots { grid-template-columns: minmax(0, 1fr); } }
"""
