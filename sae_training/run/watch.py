"""Figures of a run beyond those of its steps. Watching changes neither weights nor batches.

The store's `sample` serves no rows, and evaluation has its own, held-out text.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from os import SEEK_END
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.machine.files import SPARE_BYTES, free_bytes
from sae_training.machine.memory import memory_of
from sae_training.machine.phases import phase
from sae_training.machine.run_files import STATUS_FILE
from sae_training.parallel.ranks import is_first, n_ranks, rank, together
from sae_training.parallel.share import ALONE, Share
from sae_training.run.evals import evaluate_together
from sae_training.run.remarks import what_is_wrong
from sae_training.run.state import Member, Run
from sae_training.run.watchdog import LOOKED_AT, Health, Readings
from sae_training.training.metrics import sparsity_metrics

NORM_ROWS = 8_192  # of the buffer, whose norms the report shows
ROWS_COMPARED = 64  # of a batch, in which copies are looked for
READ_EVERY_S = 5.0  # disk and memory
BYTES_RECALLED = 2**21  # of metrics.jsonl, over 2,000 rows, which tell a run that goes on what is normal in it


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


# ------------------------------------------------------------------------------------------------------ the watchdog


def look_out(run: Run, shown: Sequence[Mapping[str, float]]) -> None:
    """Say what the figures of a logged step, `shown` for each autoencoder in training, and its surroundings tell."""
    dog, news = run.watchdog, []
    for member, figures in zip(run.trained, shown, strict=True):
        if member.is_recorded:
            found = health_of(run, member).look(run.step, figures)
            new = dog.news(run.step, found, member.name, known=member.said)
            news += [(member, alert) for alert in new]
    if is_first() and run.trained:
        found = dog.surroundings.look(readings(run))
        news += [(run.members[0], alert) for alert in dog.news(run.step, found)]
    for member, alert in news:
        said = f"after step {alert['step']}, {alert['message']}."
        name = alert.get("name", "")
        member.tell(f"{name}: {said}" if name else said)
        member.logger.alert(f"{alert['kind']}{f' of {name}' if name else ''}", said)
    if n_ranks() > 1:  # because the first rank writes the status of all
        own = {f"{rank()} {number}": alert for number, (_, alert) in enumerate(news)}
        dog.alerts += [alert for alert in together(own).values() if alert not in dog.alerts]


def health_of(run: Run, member: Member) -> Health:
    health = run.watchdog.health
    if member.name not in health:
        health[member.name] = Health(member.cfg, run.cfg.tokens_per_step)
    return health[member.name]


def readings(run: Run) -> Readings:
    """Return what surrounds the run. Disk and memory, which take a system call each, are read from time to time."""
    now, dog = time.monotonic(), run.watchdog.surroundings
    rate = run.progress.tokens_per_s(run.step)
    steps_left = run.cfg.total_training_steps - run.step
    is_read = now - dog.read_at >= READ_EVERY_S
    dog.read_at = now if is_read else dog.read_at
    return Readings(
        seconds=now,
        tokens=run.n_training_tokens,
        n_buffered=run.store.n_buffered,
        seconds_left=steps_left * run.cfg.tokens_per_step / rate if rate else math.inf,
        share_left=steps_left / run.cfg.total_training_steps,
        n_passes=run.store.text.n_passes,
        rows=row_sums(run.store.latest[1].inputs[0]) if run.store.latest else [],
        disk=(free_bytes(run.folder.path), next_checkpoint_bytes(run)) if is_read and not run.is_saving else None,
        memory=memory_of(run.store.device) if is_read else None,
    )


@torch.no_grad()
def row_sums(rows: Tensor) -> list[float]:
    """Return the sums of some rows, by which copies are known; rows of zeros, as behind a ReLU, are none."""
    return [value for value in rows[:ROWS_COMPARED].sum(dim=1).tolist() if value]


def next_checkpoint_bytes(run: Run) -> int:
    """Return what the next save takes: as much as the last checkpoint; before the first, weights and both moments."""
    last = run.last_checkpoint
    if last is not None:
        with suppress(OSError):  # one that is just being deleted
            return SPARE_BYTES + sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    weights = sum(p.numel() * p.element_size() for member in run.trained for p in member.trainer.sae.parameters())
    return SPARE_BYTES + 3 * weights


def recall(run: Run) -> None:
    """Learn what was said of the run before it was stopped, and what is normal in it, from its folder.

    What is damaged there is left out: then something is said once more.
    """
    if not run.step:
        return
    with suppress(OSError, ValueError, AttributeError, TypeError):
        status = json.loads((run.folder.path / STATUS_FILE).read_text(encoding="utf-8"))
        run.watchdog.alerts = [alert for alert in status.get("alerts", []) if {"kind", "message"} <= alert.keys()]
    for member in run.trained:
        if member.is_recorded:
            health = health_of(run, member)
            for row in last_rows(member.logger.path):
                if isinstance(row, dict) and all(row.get(name) is not None for name in LOOKED_AT):
                    health.look(row["step"], row)


def last_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of the last BYTES_RECALLED of a metrics.jsonl."""
    with path.open("rb") as file:
        file.seek(-min(BYTES_RECALLED, file.seek(0, SEEK_END)), SEEK_END)
        for line in file:
            with suppress(ValueError):  # the first is cut
                yield json.loads(line)
