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
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sae_training.weights import write_text

METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
TOKENS_KEY = "details/n_training_tokens"

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
_LABELS = {
    "CE_loss_score": "CE score",
    "eval_explained_variance": "Explained variance, held out",
    "explained_variance": "Explained variance",
    "eval_l0": "L0, held out",
    "l0": "L0",
    "dead_features": "Dead latents",
    "eval_dead_fraction": "Latents that never fired on held-out tokens, fraction",
    "ce_loss_without_sae": "CE loss, clean",
    "ce_loss_with_sae": "CE loss, with SAE",
    "ce_loss_with_ablation": "CE loss, zero-ablated",
    "kl_with_sae": "KL divergence, with SAE",
    "kl_with_ablation": "KL divergence, zero-ablated",
    "kldiv_reconstructed": "Attention KL, with SAE",
    "kldiv_ablation": "Attention KL, zero-ablated",
    "l2_ratio": "L2 norm, reconstruction / input",
    "l2_norm": "L2 norm of the reconstruction",
    "below_1e-5": "Latents firing below 1e-5",
    "below_1e-6": "Latents firing below 1e-6",
    "mean_log10_feature_sparsity": "Mean log10 firing frequency",
    "mean_passes_since_fired": "Mean steps since last firing",
    "explained_variance_std": "Explained variance, spread over tokens",
    "feature_density_line_chart": "Feature density",
    "activation_norm": "Norm of the activations",
}


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order; a last line that a kill cut short is left out.

    A run folder without the file has no rows. FileNotFoundError if it is not a run folder, ValueError
    for a line in the middle that is not JSON.
    """
    _check_run_folder(run_folder)
    path = run_folder / METRICS_FILE
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: found text that is not JSON, expected one row a line; remove the line"
            ) from error
        rows.append(row)
    return rows


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


def _check_run_folder(folder: Path) -> None:
    if not (folder / METRICS_FILE).exists() and not (folder / "config.json").exists():
        found = "no such folder" if not folder.is_dir() else "neither file is in it"
        raise FileNotFoundError(
            f"{folder}: {found}, expected a run folder with {METRICS_FILE} or config.json; "
            "give the folder that training printed (runs/<run name>)"
        )


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


def _label(key: str) -> str:
    last = key.rsplit("/", 1)[-1]
    return _LABELS.get(last) or last.replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_point(value: Any) -> bool:
    return value is None or _is_number(value)  # None is a value that was not finite: a gap


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
