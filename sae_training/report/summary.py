"""What a finished run says on the screen: the figures that matter, and how to load the autoencoder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_training.machine.run_files import REPORT_FILE, RUN_CONFIG_FILE
from sae_training.report.in_words import BASE, SCORE, is_figure, notes

FIGURES = (
    ("explained variance", "metrics/eval_explained_variance", ".4f", "1 is perfect, 0 the mean row; all rows at once"),
    ("L0", "metrics/eval_l0", ".1f", "active latents per row, of {d_sae:,}"),
    ("dead latents", "sparsity/dead_features", ",.0f", "{dead}"),
    ("silent in evaluation", "silent", ",.0f", "latents that fire on none of these rows"),
    ("CE loss, clean", "metrics/ce_loss_without_sae", ".4f", "the language model as it is, nats per token"),
    ("CE loss, with SAE", "metrics/ce_loss_with_sae", ".4f", "reconstructions in place of activations"),
    ("CE loss, ablated", "metrics/ce_loss_with_ablation", ".4f", "zeros in place of activations"),
    ("CE score", SCORE, ".4f", "(ablated - with SAE) / (ablated - clean); 1 is perfect"),
)

# What centring the weights changes: the residual stream, and all that is added to it.
WRITTEN_TO_THE_STREAM = ("resid", "_out", "embed", "hook_result")

CENTRED = (
    "  # Its rows are those of TransformerLens: of a model with LayerNorm (GPT-2, Pythia; not Llama), hidden states h",
    "  # of transformers fit after h - h.mean(-1, keepdim=True). With model_processing none, runs train on h as it is.",
)


def summary(folder: Path, evaluation: Mapping[str, Any], d_sae: int) -> str:
    """Return a table of `evaluation` (what evaluation.json holds), what goes with it, and how to load the run."""
    dead = evaluation.get(f"{BASE}dead_latents", "silent for longer than the dead window, in training")
    values = {**evaluation, "silent": evaluation.get("metrics/eval_dead_fraction", math.nan) * d_sae}
    lines = [
        f"  {name:<22}{format(values[key], form):>10}   {meaning.format(d_sae=d_sae, dead=dead)}"
        if is_figure(values[key])
        else f"  {name:<22}{'-':>10}   {values[key]}"
        for name, key, form, meaning in FIGURES
        if is_figure(values.get(key)) or isinstance(values.get(key), str)  # where no text is held out, few are there
    ]
    return "\n".join(
        [
            "",
            *lines,
            *([""] if lines else []),
            *(f"  {note}" for note in notes(evaluation)),
            "",
            f"Run folder: {folder}",
            f"Curves:     {folder / REPORT_FILE}",
            "Load it in Python:",
            *how_to_load(folder),
            "",
        ]
    )


def how_to_load(folder: Path) -> list[str]:
    """Return the lines of Python that load an autoencoder with its language model and its text, and what to mind."""
    return [
        "  from sae_training.utils import LMSparseAutoencoderSessionloader",
        f"  model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained({str(folder)!r})",
        *([] if has_plain_rows(folder) else CENTRED),
    ]


def has_plain_rows(folder: Path) -> bool:
    """Return whether the autoencoder of a run reads the same activations as transformers has."""
    path = folder / RUN_CONFIG_FILE
    cfg = json.loads(path.read_text(encoding="utf-8")).get("config", {}) if path.is_file() else {}
    hooks = f"{cfg.get('hook_point')} {cfg.get('target_hook_point')}"
    return cfg.get("model_processing") == "none" or not any(name in hooks for name in WRITTEN_TO_THE_STREAM)
