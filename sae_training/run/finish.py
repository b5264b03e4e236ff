"""TODO."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from sae_training.config.io import config_to_dict
from sae_training.config.sweep import is_several
from sae_training.formats.native import CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE
from sae_training.language_model.load import fingerprint
from sae_training.machine.files import write_safetensors, write_text
from sae_training.report.comparison import comparison_table, write_comparison
from sae_training.report.curves import write_report
from sae_training.report.summary import summary
from sae_training.run import checkpoint
from sae_training.run.evals import evaluate_together
from sae_training.run.folder import read_run_config
from sae_training.run.run import Member, Run, check_finite
from sae_training.training.metrics import sparsity_metrics
from sae_training.training.schedules import due

EVALUATION_FILE = "evaluation.json"

NORM_ROWS = 8_192  # of the buffer, whose norms the report shows


def report_run(path: str | Path) -> Path:
    """Write report.html of the run in `path`: its curves or, if it is one of several autoencoders, their comparison."""
    path = Path(path)
    if not (path / "config.json").is_file() or not is_several(read_run_config(path)):
        return write_report(path)
    evaluation = path / "final" / EVALUATION_FILE
    if not evaluation.is_file():
        names = ", ".join(sorted(folder.parent.name for folder in path.glob("*/metrics.jsonl")))
        raise ValueError(f"{path}: several autoencoders, still in training; give the folder of one of them: {names}.")
    return write_comparison(path, json.loads(evaluation.read_text(encoding="utf-8")))


def evaluate_now(run: Run) -> list[tuple[Member, dict[str, float]]]:
    """The figures of `evaluate` for each autoencoder; none with evaluation off (eval_every_steps=0) or no text held
    out (n_eval_batches=0).
    """
    if run.cfg.eval_every == 0 or len(run.held_out) == 0:
        return [(member, {}) for member in run.trained]
    saes = [(member.sae, member.sites) for member in run.trained]
    return list(zip(run.trained, evaluate_together(saes, run.store, run.held_out), strict=True))


def log_norms(run: Run) -> None:
    """Log how large the model's activations are that each autoencoder is trained on: outliers (a BOS position) show
    here, whatever they are scaled by in training.
    """
    for member in run.trained:
        if member.is_scaled:
            scale, target_scale = member.scales
            member.logger.log({"details/input_scale": scale, "details/target_scale": target_scale}, 0, 0)
        norms = run.store.sample(NORM_ROWS, member.sites).x.float().norm(dim=1)
        member.logger.log_histogram("plots/activation_norm", norms / member.scales[0], 0)


def log_sparsity(run: Run, member: Member) -> None:
    """Log how often latents fired, in the window of firing counts that has just ended or (at the end) lately."""
    log_frequency = member.trainer.tracker.log_frequency()
    figures = sparsity_metrics(log_frequency, member.cfg.dead_feature_threshold)
    member.logger.log(figures, run.step, run.n_training_tokens)
    member.logger.log_histogram("plots/feature_density_line_chart", log_frequency, run.step)


# -------------------------------------------------------------------------------------------------------------- save


def save(run: Run) -> Path | None:
    """Save everything the run needs to go on as if it had not stopped; None, with a message, if the disk is full."""
    for member in run.trained:
        check_finite(run, member, weights=True)
    parts, texts = {"store": run.store.state_dict()}, {}
    for member in run.members:
        sae, trainer_state = member.sae, member.trainer.state_dict()
        if not member.is_scaled:
            trainer_state.pop("weights")  # they are those of `sae`
        # Loaders read the part "sae", resuming goes on from the weights of "trainer" where these are others.
        parts |= {member.part("sae"): dict(sae.weights()), member.part("trainer"): trainer_state}
        texts[member.part(CONFIG_FILE)] = json.dumps(config_to_dict(sae.cfg), indent=2) + "\n"
    state = {
        "metrics_bytes": {member.name: member.logger.position() for member in run.members},
        "failures": {member.name: member.failure for member in run.members if member.failure},
        "language_model": fingerprint(run.store.model),
    }
    try:
        saved = checkpoint.save_checkpoint(run.folder.checkpoints, run.step, parts, state, extra_files=texts)
    except OSError as error:
        tqdm.write(f"Checkpoint not saved; the last one is {run.last_checkpoint or 'none'}. {error}")
        return None
    finally:
        run.last_checkpoint_time = time.monotonic()
    run.last_checkpoint = saved
    checkpoint.delete_old(run.folder.checkpoints, run.cfg.keep_checkpoints)
    run.write_status("training")
    return saved


def save_weights_folder(member: Member, folder: Path, aliases: tuple[str, ...], **texts: str) -> None:
    """Weights, config and log10 firing frequencies in `folder`, whole or not at all, and as wandb artifacts."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    member.sae.save_model(partial)
    log_frequency = member.trainer.tracker.log_frequency()
    write_safetensors(partial / SPARSITY_FILE, {"log_feature_sparsity": log_frequency})
    for name, text in texts.items():
        write_text(partial / f"{name}.json", text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)

    name = member.trainer.sae.get_name()
    metadata = config_to_dict(member.cfg)
    files = [folder / WEIGHTS_FILE, folder / CONFIG_FILE]
    member.logger.log_artifact(name, "model", files, metadata=metadata, aliases=aliases)
    member.logger.log_artifact(
        f"{name}_log_feature_sparsity", "log_feature_sparsity", [folder / SPARSITY_FILE], aliases=aliases
    )


def finish(run: Run) -> None:
    """Last evaluation, final/, report.html: the curves or, of several, their comparison (a page of curves for each
    would take a second and 5 MB; the command `report` draws them).
    """
    for member in run.trained:
        check_finite(run, member, weights=True)
        if not due(run.step, run.cfg.feature_sampling_window):
            log_sparsity(run, member)
        member.trainer.take_average()
    evaluations = {}
    for member, figures in evaluate_now(run):
        evaluation = figures | {"sparsity/dead_features": int(member.trainer.tracker.dead().sum())}
        evaluations[member.name] = evaluation
        member.logger.log(evaluation, run.step, run.n_training_tokens)
        member.trainer.sae.eval()
        save_weights_folder(
            member,
            member.folder / "final",
            aliases=("final_model",),
            evaluation=json.dumps(evaluation, indent=2) + "\n",
        )
    if not is_several(run.cfg):
        run.write_status("finished")
        write_report(run.folder.path)
        tqdm.write(summary(run.folder.path, evaluations[""], run.sae.d_sae))
        return
    write_comparison(run.folder.path, evaluations)
    partial = run.folder.final.with_name("final.tmp")  # final/ says that the run is finished: it comes last, and whole
    partial.mkdir(exist_ok=True)
    write_text(partial / EVALUATION_FILE, json.dumps(evaluations, indent=2) + "\n")
    os.replace(partial, run.folder.final)
    run.write_status("finished")
    tqdm.write(comparison_table(run.folder.path, evaluations))
