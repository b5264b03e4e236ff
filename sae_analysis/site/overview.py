"""What the first page shows of all latents together, and the rows of the list."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sae_analysis.site.records import tokens_of_windows
from sae_analysis.site.scripts import short, shorts

N_BINS = 40
N_ROW_TOKENS = 5
BEFORE, AFTER = 14, 6  # tokens shown beside the strongest one
LONGEST_TOKEN = 40
COLUMNS = (
    "density", "max", "mean", "variance", "skew", "kurtosis", "mean_position", "encoder_decoder_cosine", "decoder_norm",
    "encoder_norm", "encoder_bias", "decoder_x", "decoder_y", "logit_skew", "logit_kurtosis", "token_entropy",
    "top_token_share",
)  # fmt: skip
"""What latents can be sorted and drawn by: a file each."""
ROW_FIGURES = ("density", "max", "skew", "top_token_share")


def histograms(latents: pd.DataFrame) -> dict[str, Any]:
    """Return counts and edges of the densities (of log10 of them) and of the cosines of encoder and decoder."""
    density = latents["density"].to_numpy(dtype=float)
    cosine = latents["encoder_decoder_cosine"].to_numpy(dtype=float)
    return {
        "density": histogram(np.log10(density[density > 0])),
        "cosine": histogram(cosine[np.isfinite(cosine)]),
    }


def histogram(values: np.ndarray) -> dict[str, Any]:
    if len(values) == 0:
        return {"counts": [], "edges": []}
    counts, edges = np.histogram(values, bins=N_BINS)
    return {"counts": counts.tolist(), "edges": shorts(edges, 6)}


def row(record: dict[str, Any]) -> list[Any]:
    """Return [latent, tokens, [text before, token, text after] of the strongest example, figures of ROW_FIGURES]."""
    example: list[str] = []
    for texts, at in tokens_of_windows(record):
        before = "".join(texts[max(0, at - BEFORE) : at])
        example = [before[-80:], texts[at][:80], "".join(texts[at + 1 : at + 1 + AFTER])[:40]]
        break
    figures = [short(record["figures"][name], 3) for name in ROW_FIGURES]
    return [record["latent"], [text[:LONGEST_TOKEN] for text, _ in record["tokens"][:N_ROW_TOKENS]], example, figures]
