"""Reading metrics.jsonl, and what people call its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_training.machine.run_files import METRICS_FILE, RUN_CONFIG_FILE

TOKENS_KEY = "details/n_training_tokens"

# In the order in which tables show them.
LABELS = {
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
    """Return the rows of metrics.jsonl in order, without a last line that a kill cut short.

    A run folder without the file has no rows. Raises FileNotFoundError if the folder is not that of a run, and
    ValueError for a line in the middle that is not JSON.
    """
    check_run_folder(run_folder)
    path = run_folder / METRICS_FILE
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: found text that is not JSON, expected one row a line; remove the line"
            ) from error
    return rows


def check_run_folder(folder: Path) -> None:
    if not (folder / METRICS_FILE).exists() and not (folder / RUN_CONFIG_FILE).exists():
        found = "no such folder" if not folder.is_dir() else "neither file is in it"
        raise FileNotFoundError(
            f"{folder}: {found}, expected a run folder with {METRICS_FILE} or {RUN_CONFIG_FILE}; "
            "give the folder that training printed (runs/<run name>)"
        )


def label(key: str) -> str:
    """Return what a metric is called on a page, by the last part of its key."""
    last = key.rsplit("/", 1)[-1]
    return LABELS.get(last) or last.replace("_", " ")
