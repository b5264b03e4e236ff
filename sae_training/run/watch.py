"""Figures of a run beyond those of its steps. Watching changes neither weights nor batches.

The store's `sample` serves no rows, and evaluation has its own, held-out text.
"""

from __future__ import annotations

from collections.abc import Mapping

from sae_training.machine.phases import phase
from sae_training.parallel.share import ALONE, Share
from sae_training.run.evals import evaluate_together
from sae_training.run.remarks import what_is_wrong
from sae_training.run.state import Member, Run
from sae_training.training.metrics import sparsity_metrics

NORM_ROWS = 8_192  # of the buffer, whose norms the report shows


def evaluate_now(run: Run) -> list[tuple[Member, dict[str, float]]]:
    """Return the figures of `evals.evaluate` for each autoencoder that is in training.

    There are none with evaluation off (eval_every_steps=0), or no text held out (n_eval_batches=0).
    """
    if not is_evaluated(run):
        return [(member, {}) for member in run.trained]
    with phase("evaluation", has_bar=True):
        saes = [(member.folded(), member.sites) for member in run.trained]
        figures = evaluate_together(saes, run.store, run.held_out, share_of(run), is_everyones=True)
        evaluated = list(zip(run.trained, figures, strict=True))
    if run.step < run.cfg.total_training_steps:  # in the end the summary says it
        for member, figures in evaluated:
            say_what_is_wrong(run, member, figures)
    return evaluated


def share_of(run: Run) -> Share:
    """Return which part of the work on all autoencoders is this process's."""
    return run.trained[0].trainer.share if run.trained else ALONE


def is_evaluated(run: Run) -> bool:
    return run.cfg.eval_every > 0 and len(run.held_out) > 0


def say_what_is_wrong(run: Run, member: Member, figures: Mapping[str, float]) -> None:
    """Say what the figures show to be wrong and has not been said of this autoencoder."""
    for figure, remark in what_is_wrong(member.cfg, run.step, figures, member.scales[1]).items():
        if figure not in member.said:
            member.said.add(figure)
            member.tell(f"{member.name + ': ' if member.name else ''}after step {run.step}, {remark}.")


def log_norms(run: Run) -> None:
    """Log how large the activations are that each autoencoder is trained on, in the model's own units.

    Outliers (a BOS position) show here, whatever training scales its batches by.
    """
    for member in run.trained:
        if member.is_scaled:
            scale, target_scale = member.scales
            member.logger.log({"details/input_scale": scale, "details/target_scale": target_scale}, 0, 0)
        norms = run.store.sample(NORM_ROWS, member.sites).x.float().norm(dim=1)
        member.logger.log_histogram("plots/activation_norm", norms / member.scales[0], 0)


def log_sparsity(run: Run, member: Member) -> None:
    """Log how often latents fired in the window of firing counts that has just ended or, at the end, lately."""
    log_frequency = member.trainer.tracker.log_frequency()
    figures = sparsity_metrics(log_frequency, member.cfg.dead_feature_threshold)
    member.logger.log(figures, run.step, run.n_training_tokens)
    member.logger.log_histogram("plots/feature_density_line_chart", log_frequency, run.step)
