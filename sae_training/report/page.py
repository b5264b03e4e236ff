"""Pages that need no network: how their plots look, and their markup, which is in templates/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_training.machine.interrupt import stop_point

PLOT_BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Table(NamedTuple):
    """A table whose rows and columns have names; the title is that of the column of row names."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def render(template: str, name: str, figures: Sequence[go.Figure], draws: bool = False, **parts: Any) -> str:
    """Return the HTML of a page headed `name`, with the figures as its `plots`, from `template` in templates/.

    `draws`: it has a script that draws with plotly.
    """
    plots = [plot(figure, f"plot-{number}") for number, figure in enumerate(figures)]
    page = TEMPLATES.get_template(template)
    return page.render(name=name, plots=plots, draws=draws, plotly_js=lambda: Markup(get_plotlyjs()), **parts)


def plot(figure: go.Figure, div_id: str) -> Markup:
    """Return the figure as an element of a page that holds plotly's script."""
    stop_point()
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": PLOT_BUTTONS}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=div_id, config=config))


def style(figure: go.Figure, title: str, x_title: str, y_title: str) -> None:
    """Give a figure its titles and the look that all plots share."""
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


def shown(value: Any) -> str:
    """Return a number with four digits or, if it is large, thousands separators; lists item by item."""
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, float) and value.is_integer() and 1e3 <= abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
