"""What is wrong with a run, told from its figures and its config, and what to change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.auto import auto_lr
from sae_training.config.types import WITH_PENALTY
from sae_training.formats import Given, config_at
from sae_training.report.in_words import BASE, to_record, which_rows
from sae_training.run.folder import is_run_folder, read_run_config
from sae_training.training.schedules import lr_at

MEAN_SHARE = 0.5  # of the squared norm of rows; above it, most of the error is the mean if b_dec is not there
UNUSUAL_SIZE = 10.0  # of centred elements: beyond it, or below its inverse, the size of rows is part of the problem
FAR_FROM_AUTO = 10.0  # a learning rate this many times the rule's, or below it
FEW_STEPS = 100


def what_is_wrong(
    cfg: LanguageModelSAERunnerConfig, step: int, figures: Mapping[str, float], target_scale: float = 1.0
) -> dict[str, str]:
    """Return a sentence for each figure that says that a run is broken, by the figure. Sound runs have none.

    `figures` are those of `evals.evaluate` after `step` steps of `cfg`, perhaps with the number of dead latents;
    `target_scale` is the factor of the rows that the autoencoder predicts in training.
    """
    found = {}
    if figures.get("sparsity/dead_features") == cfg.d_sae:
        found["dead latents"] = f"all {cfg.d_sae:,} latents are dead: {against_silence(cfg)}"
    if f"{BASE}rows" not in figures:
        return found
    if not figures[f"{BASE}rows"]:
        return {"rows": f"no held-out row counts ({which_rows(vars(cfg))}); relax what leaves them out"}
    explained = figures["metrics/eval_explained_variance"]
    if figures["metrics/eval_l0"] == 0:
        found = {
            "L0": f"L0 is 0: no latent fires on any held-out row, so every reconstruction is b_dec; "
            f"{against_silence(cfg)}"
        }
    if not math.isfinite(explained):
        found["explained variance"] = f"explained variance is not a number: {why_no_variance(figures)}"
    elif explained < 0:
        found["explained variance"] = (
            f"explained variance is {explained:,.4g} on held-out rows, worse than predicting their mean, which is 0: "
            f"{'; '.join(why_worse_than_the_mean(cfg, step, figures, target_scale))}"
        )
    if figures[f"{BASE}predicted_tokens"]:
        losses = {"without_sae": "the language model's own loss", "with_sae": "the loss on reconstructions"}
        for key, loss in losses.items():
            if "CE loss" not in found and not math.isfinite(figures[f"metrics/ce_loss_{key}"]):
                found["CE loss"] = (
                    f"{loss} is not a number: the last layers of the language model overflow in {cfg.lm_dtype}; set "
                    "lm_dtype to bfloat16 or float32"
                )
    return found


def record_of(
    figures: Mapping[str, float], path: Path, n_eval_batches: int | None = None, **given: Any
) -> dict[str, Any]:
    """Return the figures of an evaluation with what is over them and what is wrong: of a run as in its final/.

    `path`, `n_eval_batches` and `given` are what `evaluate_run` took.
    """
    if f"{BASE}rows" not in figures:
        return to_record(figures, {})
    if not is_run_folder(path):
        with warnings.catch_warnings(action="ignore"):  # which were given when it was loaded
            return to_record(figures, vars(config_at(path, Given(**given))), what_is_wrong_with_files(figures))
    cfg = read_run_config(path)
    return to_record(figures, vars(cfg), list(what_is_wrong(cfg, cfg.total_training_steps, figures).values()))


def what_is_wrong_with_files(figures: Mapping[str, float]) -> list[str]:
    """Return sentences on an autoencoder that was not trained in a run here, and does badly on this model and text."""
    if figures["metrics/eval_explained_variance"] < 0:
        return [
            f"explained variance is {figures['metrics/eval_explained_variance']:,.4g} on held-out rows, worse than "
            "predicting their mean, which is 0: an autoencoder of another model, place, processing or size of "
            "activations does that; compare model_name, hook_point, model_processing and norm_factor with its training"
        ]
    return ["L0 is 0: no latent fires on any held-out row"] if figures["metrics/eval_l0"] == 0 else []


def against_silence(cfg: LanguageModelSAERunnerConfig) -> str:
    """Say what makes latents fire."""
    lr = f"lower lr (now {cfg.resolved_lr:.3g})"
    if cfg.architecture not in WITH_PENALTY:
        return f"{lr}, or raise lr_warm_up_steps (now {cfg.resolved_lr_warm_up_steps})"
    return f"lower l1_coefficient (now {cfg.l1_coefficient:.3g}), raise l1_warm_up_steps, or {lr}"


def why_no_variance(figures: Mapping[str, float]) -> str:
    if figures[f"{BASE}row_std"] == 0:
        return "all held-out rows are the same, so there is nothing to explain; choose another hook_point, or more text"
    return "reconstructions are not finite; lower lr, and begin anew"


def why_worse_than_the_mean(
    cfg: LanguageModelSAERunnerConfig, step: int, figures: Mapping[str, float], target_scale: float
) -> list[str]:
    """Return the likely reasons, each with what to change; without one, what to try."""
    reasons = []
    lr, total = cfg.resolved_lr, cfg.total_training_steps
    share, std = figures[f"{BASE}mean_row_share"], figures[f"{BASE}row_std"]
    if cfg.b_dec_init_method == "zeros" and cfg.from_pretrained_path is None and share > MEAN_SHARE:
        way, far = travelled(cfg, step), figures[f"{BASE}largest_mean_element"] * target_scale
        moved = f" and has moved by {way:.3g} at most, towards elements of up to {far:.3g}" if way < far else ""
        size = "over 99.9%" if share > 0.999 else f"{share:.1%}"
        return [
            f"the mean row has {size} of the rows' squared norm, and b_dec began at zeros{moved}; set "
            "b_dec_init_method to geometric_median or mean"
        ]
    if cfg.normalize_activations == "none" and not 1 / UNUSUAL_SIZE <= std <= UNUSUAL_SIZE:
        reasons.append(
            f"elements of rows lie {std:.3g} around their means, and batches are not scaled; set normalize_activations "
            "to expected_average_only_in"
        )
    by_rule = auto_lr(cfg.d_sae, total)
    if lr > FAR_FROM_AUTO * by_rule:
        reasons.append(f"lr {lr:.3g} is {lr / by_rule:,.0f} times what lr auto would take; lower it to {by_rule:.2g}")
    elif lr < by_rule / FAR_FROM_AUTO:
        reasons.append(f"lr {lr:.3g} is {lr / by_rule:.1%} of what lr auto would take; raise it to {by_rule:.2g}")
    warm_up = cfg.resolved_lr_warm_up_steps
    if total <= warm_up:
        reasons.append(
            f"all {total} steps are warm-up; lower lr_warm_up_steps ({warm_up}), or raise total_training_tokens"
        )
    elif total < FEW_STEPS:
        reasons.append(f"the run has {total} steps; raise total_training_tokens")
    if cfg.architecture in WITH_PENALTY and 0 < figures["metrics/eval_l0"] < 1:
        reasons.append(f"L0 is {figures['metrics/eval_l0']:.2g}; {against_silence(cfg)}")
    return reasons or [f"lower lr (now {lr:.3g}), or raise total_training_tokens (now {total:,} steps)"]


def travelled(cfg: LanguageModelSAERunnerConfig, step: int) -> float:
    """Return how far Adam, which moves an element by about lr a step, can have moved one in `step` steps."""
    return sum(lr_at(cfg, number) for number in range(step))
