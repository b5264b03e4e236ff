"""Say in plain words what the figures of an evaluation are over, and why one that means nothing is left out.

Both follow from the figures of `run.evals.evaluate` and the run's config. Keys that begin with `base/` say what the
other figures are over: numbers of rows, positions and predicted tokens, and facts of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

BASE = "base/"
SCORE = "metrics/CE_loss_score"

SMALLEST_CHANGE = 0.01
"""Nats per token. Where zeros in place of the activations cost less, the CE score is a ratio of two noises: up to 18 in
a model with random weights."""

ROW_FIELDS = ("exclude_special_tokens", "seqpos_slice", "max_activation_norm_multiple", "pack_sequences")
"""The fields of a config that decide which rows count."""


def why_no_score(figures: Mapping[str, Any]) -> str | None:
    """Return why the CE score of these figures would mean nothing; None if it is a number to go by."""
    names = ("without_sae", "with_sae", "with_ablation")
    clean, with_sae, ablated = (figures.get(f"metrics/ce_loss_{name}", math.nan) for name in names)
    if not all(map(math.isfinite, (clean, with_sae, ablated))):
        return "no score: a loss is not a number"
    if ablated <= clean:
        return f"no score: zeros in place of the activations lower the loss, by {clean - ablated:.4f} nats per token"
    if ablated - clean < SMALLEST_CHANGE:
        return (
            "no score: zeros in place of the activations change next to nothing "
            f"({ablated - clean:.4f} nats per token, below {SMALLEST_CHANGE})"
        )
    if clean >= (by_chance := figures.get(f"{BASE}ce_loss_by_chance", math.inf)):
        return (
            f"no score: the language model predicts no better than chance ({clean:.2f} nats per token, by chance "
            f"{by_chance:.2f})"
        )
    return None


def which_rows(fields: Mapping[str, Any]) -> str:
    """Say which positions the rows of a config are from; `fields`: the values of ROW_FIELDS, perhaps among others."""
    left_out = []
    if fields.get("exclude_special_tokens"):
        left_out.append("special tokens such as BOS (exclude_special_tokens)")
    if positions := fields.get("seqpos_slice"):
        ends = [None, *positions] if len(positions) == 1 else positions  # as slice() reads them
        written = ":".join("" if end is None else str(end) for end in ends)
        left_out.append(f"positions outside [{written}] of each sequence (seqpos_slice)")
    if (multiple := fields.get("max_activation_norm_multiple")) is not None:
        left_out.append(f"rows of more than {multiple:g} times the median norm (max_activation_norm_multiple)")
    if fields.get("pack_sequences") is False:
        left_out.append("padding")
    special = "" if fields.get("exclude_special_tokens") else "; special tokens such as BOS count"
    return f"without {', '.join(left_out)}{special}" if left_out else f"all positions{special}"


def rows_counted(evaluation: Mapping[str, Any]) -> str:
    """Say how many rows the figures about rows are over, and which: a line, or "" where the evaluation does not say."""
    rows, positions = evaluation.get(f"{BASE}rows"), evaluation.get(f"{BASE}positions")
    if rows is None or positions is None:
        return ""
    which = evaluation.get(f"{BASE}which_rows")
    return f"{rows:,} rows of {positions:,} held-out positions" + (f", {which}" if which else "")


def tokens_predicted(evaluation: Mapping[str, Any]) -> str:
    """Say which tokens the losses are over; "" where the evaluation does not say."""
    predicted = evaluation.get(f"{BASE}predicted_tokens")
    if predicted is None:
        return ""
    return f"{predicted:,} predicted tokens, special ones included; positions left out keep their activations"


def dead_window(fields: Mapping[str, Any], steps: int) -> str:
    """Say for how long a latent must be silent in training to count as dead, in a run of so many steps."""
    rows, window = fields.get("dead_feature_window_tokens"), fields["dead_feature_window"]
    is_long = steps > window if rows is None else steps * fields["tokens_per_step"] > rows
    said = f"silent for the last {window:,} steps" if rows is None else f"silent for the last {rows:,} rows"
    return f"{said} of training" if is_long else f"{said}: the run was no longer, so none can be"


def to_record(
    figures: Mapping[str, Any], fields: Mapping[str, Any], remarks: Sequence[str] = (), dead: str | None = None
) -> dict[str, Any]:
    """Return what evaluation.json holds: the figures, in place of those that are no numbers why, and which rows count.

    `fields`: the values of the config by name. `dead`: what a dead latent is (`dead_window`). Without an evaluation on
    held-out text nothing is said of rows.
    """
    record: dict[str, Any] = {key: value for key, value in figures.items() if math.isfinite(value)}
    for key in figures.keys() - record.keys():
        record[key] = (why_no_score(figures) if key == SCORE else None) or "not a number"
    record = {key: record[key] for key in figures}
    if f"{BASE}rows" in figures:
        record |= {f"{BASE}{name}": fields[name] for name in ROW_FIELDS} | {f"{BASE}which_rows": which_rows(fields)}
        record |= {f"{BASE}dead_latents": dead} if dead else {}
    return record | ({"remarks": [*remarks]} if remarks else {})


def is_figure(value: Any) -> bool:
    """Return whether a value of an evaluation is a number to show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the sentences that go with the figures of an evaluation: what is wrong, and what the figures are over."""
    over = {
        "Explained variance, L0 and norms": rows_counted(evaluation),
        "CE and KL": tokens_predicted(evaluation),
    }
    wrong = [f"Something is wrong: {remark}." for remark in evaluation.get("remarks", ())]
    return [*wrong, *(f"{name}: {said}." for name, said in over.items() if said)]


def notes_on_dead(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the sentence that says what a dead latent is, where the evaluation says it."""
    dead = evaluation.get(f"{BASE}dead_latents")
    return [f"Dead latents: {dead}."] if dead else []
