"""Draws one HTML page, readable offline, of how well an autoencoder found a known dictionary."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from sae_training.machine.files import write_text

MOST_FEATURES = 512  # in the matrix of cosines; of more features, every second (or third, ...) is shown
BLUE = "#2563eb"


def write_picture(path: Path, title: str, cosines: Tensor, matched: Tensor, f1: Tensor, frequencies: Tensor) -> None:
    """Write the page to `path`, whole or not at all.

    `cosines` (n_features, d_sae) of true directions with decoder rows; `matched` (n_features,), the latent of each
    feature or -1; `f1` and `frequencies` (n_features,) of the true firing. The page has three plots: the histogram of
    each feature's best cosine, F1 against frequency, and the cosines of matched features and latents in one order.
    """
    cosines, matched, f1, frequencies = (t.detach().cpu() for t in (cosines, matched, f1, frequencies))
    figure = make_subplots(
        rows=1,
        cols=3,
        horizontal_spacing=0.07,
        subplot_titles=("Best cosine of each feature", "F1 against firing frequency", "Cosines, matched order"),
    )
    best = cosines.max(dim=1).values
    figure.add_trace(
        go.Histogram(
            x=best.tolist(),
            xbins={"start": min(0.0, best.min().item()), "end": 1.02, "size": 0.02},
            marker={"color": BLUE},
            hovertemplate="%{y:,} features at cosine %{x}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    figure.add_vline(x=0.9, line={"dash": "dot", "color": "#6b7280"}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    figure.add_trace(
        go.Scattergl(
            x=frequencies.tolist(),
            y=[None if value != value else value for value in f1.tolist()],
            text=[f"feature {i}" for i in range(len(f1))],
            mode="markers",
            marker={"size": 5, "color": best.tolist(), "colorscale": "Viridis", "cmin": 0, "cmax": 1},
            hovertemplate="%{text}: F1 %{y:.3f}, frequency %{x:.3g}, best cosine %{marker.color:.3f}<extra></extra>",
        ),
        row=1,
        col=2,
    )
    shown, order = matched_order(matched)
    figure.add_trace(
        go.Heatmap(
            z=[[round(value, 2) for value in row] for row in cosines[shown][:, order].tolist()],
            x=[f"latent {i}" for i in order.tolist()],
            y=[f"feature {i}" for i in shown.tolist()],
            colorscale="RdBu_r",
            zmin=-1,
            zmax=1,
            hovertemplate="%{y}, %{x}: %{z}<extra></extra>",
        ),
        row=1,
        col=3,
    )
    figure.update_layout(title=title, template="plotly_white", showlegend=False, height=480)
    figure.update_xaxes(title_text="cosine", row=1, col=1)
    figure.update_yaxes(title_text="features", row=1, col=1)
    figure.update_xaxes(title_text="share of rows on which the feature fires", type="log", row=1, col=2)
    figure.update_yaxes(title_text="F1", range=[-0.03, 1.03], row=1, col=2)
    figure.update_xaxes(title_text="latent", showticklabels=False, row=1, col=3)
    figure.update_yaxes(title_text="feature", showticklabels=False, autorange="reversed", row=1, col=3)
    write_text(path, figure.to_html(include_plotlyjs=True))


def matched_order(matched: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features that have a latent, thinned evenly to MOST_FEATURES, and their latents in the same order."""
    with_latent = (matched >= 0).nonzero().flatten()
    stride = -(-len(with_latent) // MOST_FEATURES) or 1
    shown = with_latent[::stride]
    return shown, matched[shown]
