"""The end of a run: the last evaluation, final/ with the trained weights, report.html, and a summary on the screen.

All that was trained is saved before the evaluation, which can take as long as the training of a short run. A stop in
the evaluation costs the evaluation alone, and the run that goes on makes it again. Once final/ is there, the run is
finished, and a stop costs its page, which the command `report` draws.
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

from tqdm import tqdm

from sae_training.config.sweep import is_several
from sae_training.machine.files import NotEnoughDisk, flush_to_disk, write_text
from sae_training.machine.interrupt import StopAsked, stop_point
from sae_training.machine.paths import command
from sae_training.machine.phases import phase
from sae_training.machine.run_files import EVALUATION_FILE, FINAL, REPORT_FILE
from sae_training.parallel.ranks import is_first, together
from sae_training.report.comparison import comparison_table, write_comparison
from sae_training.report.in_words import dead_window, to_record
from sae_training.report.run_page import write_report
from sae_training.report.summary import summary
from sae_training.run.progress import figures_of
from sae_training.run.remarks import what_is_wrong
from sae_training.run.save import (
    delete_extra,
    is_of_one_alone,
    once_there_is_room,
    save_weights_folder,
    saved_now,
)
from sae_training.run.state import Member, Run, check_finite
from sae_training.run.wandb_run import words_of
from sae_training.run.watch import evaluate_now, is_evaluated, log_sparsity
from sae_training.training.schedules import due


def finish(run: Run) -> None:
    run.take_saved(wait=True)  # so that nothing says that the run is in training once it is finished
    if is_evaluated(run) or is_several(run.cfg):
        saved_now(run)
    for member in run.trained:
        check_finite(run, member, weights=True)
        if not due(run.step, run.cfg.feature_sampling_window):
            log_sparsity(run, member)
        member.trainer.take_average()
    evaluations: dict[str, dict[str, Any]] = {}
    for member, figures in last_evaluation(run):
        figures |= {"sparsity/dead_features": int(member.trainer.tracker.n_dead())}
        member.logger.log(figures, run.step, run.n_training_tokens)
        evaluations[member.name] = evaluation = recorded(run, member, figures)
        member.trainer.sae.eval()
        if member in run.recorded:
            once_there_is_room(run, partial(write_final, member, evaluation))
    evaluations = together(evaluations)
    evaluations = {name: evaluations[name] for name in run.names if name in evaluations}
    if is_several(run.cfg) and is_first():
        write_final_of_several(run, evaluations)
    delete_extra(run)
    run.failures |= together(run.own_failures)
    if is_evaluated(run):
        run.progress.figures = figures_of(list(evaluations.values()))
    run.write_status("finished")
    if is_first():
        report(run, evaluations)
    if is_several(run.cfg):
        tqdm.write(comparison_table(run.folder.path, evaluations))
        return
    ((member,), (evaluation,)) = run.trained, evaluations.values()
    tqdm.write(summary(run.folder.path, evaluation, member.shard.d_sae))


def last_evaluation(run: Run) -> list[tuple[Member, dict[str, float]]]:
    """Return the figures of each autoencoder. An error in it says that nothing trained is lost, and the way on."""
    try:
        return evaluate_now(run)
    except Exception as error:
        if is_of_one_alone(error):
            found = f"are trained, the last checkpoint is {run.last_checkpoint or 'none'}"
        else:
            found = f"are trained and saved: {saved_now(run) or 'NOT saved (see above)'}"
        error.add_note(
            f"All {run.step} steps {found}. Once this is mended, the same command evaluates them; with "
            "--eval_every_steps 0 it finishes the run without evaluation."
        )
        raise


def recorded(run: Run, member: Member, figures: dict[str, float]) -> dict[str, Any]:
    """Return the evaluation as evaluation.json holds it, after wandb has got its words."""
    remarks = list(what_is_wrong(member.cfg, run.step, figures, member.scales[1]).values())
    fields = vars(member.cfg) | {"tokens_per_step": member.cfg.tokens_per_step}
    record = to_record(figures, fields, remarks, dead_window(fields, run.step))
    member.logger.log_beside(words_of(record), run.step)
    return record


def write_final(member: Member, evaluation: dict[str, Any]) -> None:
    """Write final/ once all rows of metrics.jsonl are on the disk: a run with it is over, also after a power cut."""
    if member.is_recorded:
        member.logger.position()
        member.logger.flush_to_disk()
    save_weights_folder(member, member.folder / FINAL, evaluation)


def write_final_of_several(run: Run, evaluations: dict[str, dict[str, Any]]) -> None:
    """Write final/ of the whole run, which says that it is finished: after those of its autoencoders, and whole."""
    partial = run.folder.final.with_name(f"{FINAL}.tmp")
    partial.mkdir(exist_ok=True)
    write_text(partial / EVALUATION_FILE, json.dumps(evaluations, indent=2) + "\n", last=True)
    os.replace(partial, run.folder.final)
    flush_to_disk(run.folder.path)


def report(run: Run, evaluations: dict[str, dict[str, Any]]) -> None:
    """Write report.html, unless a stop is asked for or the disk is full.

    Of several autoencoders it is a comparison, in place of a page of curves for each, which would take a second and
    5 MB; the command `report` draws one when it is asked for.
    """
    path = run.folder.path
    try:
        stop_point()
        with phase("report"):
            write_comparison(path, evaluations) if is_several(run.cfg) else write_report(path)
    except (StopAsked, NotEnoughDisk):
        tqdm.write(f"The run is finished, without {REPORT_FILE}, which this draws: {command('report', path)}")
