"""What a finished run says on the screen: the figures that matter, and how to get the autoencoder back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path


def summary(folder: Path, evaluation: Mapping[str, float], d_sae: int) -> str:
    """The table of `evaluation` (the keys of `evals.evaluate`) and the two lines of Python that reload the run."""

    def get(key: str) -> float:
        return evaluation.get(key, math.nan)

    never_fired = get("metrics/eval_dead_fraction") * d_sae
    rows = [
        (
            "explained variance",
            f"{get('metrics/eval_explained_variance'):.4f}",
            "1 is perfect; all held-out rows at once",
        ),
        ("L0", f"{get('metrics/eval_l0'):.1f}", f"active latents per token, of {d_sae:,}"),
        (
            "dead latents",
            f"{get('sparsity/dead_features'):,.0f}",
            "silent for longer than the dead window, in training",
        ),
        ("silent in evaluation", f"{never_fired:,.0f}", "latents that fire on no held-out token"),
        ("CE loss, clean", f"{get('metrics/ce_loss_without_sae'):.4f}", "the language model as it is, nats per token"),
        ("CE loss, with SAE", f"{get('metrics/ce_loss_with_sae'):.4f}", "reconstructions in place of activations"),
        ("CE loss, ablated", f"{get('metrics/ce_loss_with_ablation'):.4f}", "zeros in place of activations"),
        ("CE score", f"{get('metrics/CE_loss_score'):.4f}", "(ablated - with SAE) / (ablated - clean); 1 is perfect"),
    ]
    # A run that holds out no text has no evaluation.
    lines = [f"  {name:<22}{value:>10}   {meaning}" for name, value, meaning in rows if value != "nan"]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"Run folder: {folder}",
            f"Curves:     {folder / 'report.html'}",
            "Load it in Python:",
            "  from sae_training.utils import LMSparseAutoencoderSessionloader",
            f"  model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained({str(folder)!r})",
            "",
        ]
    )
