"""The main job: train sparse autoencoders on a language model's activations, as one config says.

language_model_sae_runner(cfg) -> open_run (model, store, trainers, folder) -> train (the loop) -> finish (final/)
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sae_training import checkpoint
from sae_training.activations_store import ActivationsStore, find_sites, with_widths, without_cache
from sae_training.blocks import compile_blocks
from sae_training.comparison import comparison_table, write_comparison
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config_io import config_to_dict
from sae_training.evals import evaluate, evaluate_together
from sae_training.interrupt import StopRequest, TrainingInterrupted
from sae_training.language_model import (
    LanguageModel,
    fingerprint,
    language_model_dtype,
    load_language_model,
)
from sae_training.memory_plan import check_memory, plan_memory
from sae_training.metrics import sparsity_metrics, training_metrics
from sae_training.optim import check_installed
from sae_training.report import write_report
from sae_training.run import Member, Run
from sae_training.run_folder import (
    RunFolder,
    choose_run_folder,
    is_member_folder,
    read_run_config,
    with_absolute_paths,
)
from sae_training.sparse_autoencoder import SparseAutoencoder, encoder_dtype
from sae_training.start import Singles, open_run
from sae_training.summary import summary
from sae_training.sweep import is_several, variants, with_layers
from sae_training.trainer import NonFiniteLoss
from sae_training.weights import CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE, write_safetensors, write_text

EVALUATION_FILE = "evaluation.json"
NORM_ROWS = 8_192  # of the buffer, whose norms the report shows
RESAMPLE_ROWS = 16_384  # of the buffer, from which resampling draws its directions


def language_model_sae_runner(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel | None = None, dataset: Any = None
) -> SparseAutoencoder | dict[str, SparseAutoencoder]:
    """Train what `cfg` describes, or continue its unfinished run, and return the trained autoencoder.

    A config with lists describes several, which are trained together from one pass over the language model, and come
    back by name. `model` (a HookedTransformer or TransformerBridge) and `dataset` (a `datasets` object) stand in for
    those that the config names. The run's folder is runs/<run name>; see `run_folder.choose_run_folder` for when a run
    is continued.
    """
    run = run_config(cfg, model, dataset)
    return run.saes if is_several(run.cfg) else run.sae


def run_config(cfg: LanguageModelSAERunnerConfig, model: LanguageModel | None = None, dataset: Any = None) -> Run:
    """`language_model_sae_runner`, for callers who want the run and its folder too."""
    check_installed(cfg.optimizer)
    cfg = with_absolute_paths(cfg)
    lm: LanguageModel = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype) if model is None else model
    cfg = with_layers(cfg, lm.cfg.n_layers)
    # Said in the folder, so that another machine computes in the same precisions.
    precisions: dict[str, Any] = {"lm_dtype": language_model_dtype(cfg.lm_dtype, cfg.device)}
    if cfg.dtype == torch.float32:  # elsewhere "auto" is dtype on every machine
        precisions["encoder_matmul_dtype"] = encoder_dtype(
            cfg.encoder_matmul_dtype, cfg.dtype, torch.device(cfg.device)
        )
    cfg = dataclasses.replace(cfg, **precisions)
    if cfg.cached_activations_path is not None and cfg.use_cached_activations is False:
        tqdm.write(f"Live activations, not those in {cfg.cached_activations_path}: use_cached_activations is False.")
    singles = find_singles(cfg, lm)
    if not is_several(cfg):
        ((cfg, _),) = singles.values()  # with the model's widths
    return run_in_folder(choose_run_folder(cfg), cfg, singles, lm, dataset)


def resume_run(path: str | Path) -> Run:
    """Continue the unfinished run in the folder `path`, with the config it was started with."""
    path = Path(path)
    cfg = read_run_config(path)
    if is_member_folder(path):
        raise ValueError(f"{path}: is one of several that are trained together; resume {path.parent}.")
    if (path / "final").is_dir():
        where = (
            f"its autoencoders are in folders of {path}" if is_several(cfg) else f"its autoencoder is in {path}/final"
        )
        raise ValueError(f"{path}: this run is finished; {where}.")
    model = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype)
    return run_in_folder(path, cfg, find_singles(cfg, model), model, None)


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


def find_singles(cfg: LanguageModelSAERunnerConfig, model: LanguageModel) -> Singles:
    """The autoencoders that `cfg` describes, each with its config, widths filled in, and its sites in `model`."""
    found = {name: (single, find_sites(single, model)) for name, single in variants(cfg).items()}
    return {name: (with_widths(single, sites), sites) for name, (single, sites) in found.items()}


def run_in_folder(
    path: Path, cfg: LanguageModelSAERunnerConfig, singles: Singles, model: LanguageModel, dataset: Any
) -> Run:
    compile_blocks(model, cfg.compile_lm)
    some_config = next(iter(singles.values()))[0]  # they differ in nothing that the store asks for
    sites = [site for _, sites in singles.values() for site in sites]
    store = ActivationsStore(some_config, model, dataset, sites=sites)  # before the folder: bad data leaves nothing
    store.check_buffer_size()
    plan = plan_memory(cfg, [single for single, _ in singles.values()], store)
    check_memory(plan, cfg, len(singles))
    tqdm.write(f"Memory of {len(singles)} autoencoders:\n{plan.table()}" if is_several(cfg) else plan.line())
    held_out = store.held_out_tokens()
    folder = RunFolder(path, cfg)
    try:
        try:
            run = open_run(cfg, singles, folder, store, held_out)
        except BaseException:
            folder.discard_if_new()
            raise
        try:
            with StopRequest(tqdm.write) as stop:
                train(run, stop)
                finish(run)
        except BaseException as error:
            run.write_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            run.progress.close()
            for member in run.members:
                member.logger.close()
        return run
    finally:
        folder.release()


# --------------------------------------------------------------------------------------------------------- the loop


def train(run: Run, stop: StopRequest) -> None:
    cfg, store = run.cfg, run.store
    snapshots = snapshot_steps(cfg)
    if run.step == 0:
        log_norms(run)
    while run.step < cfg.total_training_steps:
        store.advance(cfg.tokens_per_step, (cfg.total_training_steps - run.step) * cfg.tokens_per_step)
        run.step += 1  # from here on, `step` counts this one as finished
        logs = due(run.step, cfg.wandb_log_frequency)
        shown = []
        for member in run.trained:
            x, target = store.batch(member.sites)
            result = member.trainer.step(x, run.step - 1, target)
            if logs or store.device.type == "cpu":  # elsewhere it would make the device wait at every step
                check_finite(run, member)
            if logs and member.failure is None:
                shown.append(training_metrics(result, member.trainer.tracker, run.n_training_tokens))
                member.logger.log(shown[-1], run.step, run.n_training_tokens)
                rate = {"details/tokens_per_second": run.progress.tokens_per_s(run.step)}
                member.logger.log_timing(rate, run.step)
        if logs:
            run.progress.show(shown)
            run.write_status("training")
        if due(run.step, cfg.feature_sampling_window):
            for member in run.trained:
                member.trainer.tracker.start_new_window()
                log_sparsity(run, member)
                resample_dead_latents(run, member)
        if due(run.step, cfg.eval_every) and run.step < cfg.total_training_steps:
            for member, figures in evaluate_now(run):
                member.logger.log(figures, run.step, run.n_training_tokens)
        if run.step in snapshots:
            for member in run.trained:
                save_weights_folder(member, member.folder / "snapshots" / f"step_{run.step}", aliases=())
        if stop.signal is not None:
            stop_here(run, stop)
        if checkpoint_is_due(run):
            save(run)
        run.progress.advance()


def evaluate_now(run: Run) -> list[tuple[Member, dict[str, float]]]:
    """The figures of `evaluate` for each autoencoder; none with evaluation off (eval_every_steps=0) or no text held
    out (n_eval_batches=0).
    """
    if run.cfg.eval_every == 0 or len(run.held_out) == 0:
        return [(member, {}) for member in run.trained]
    saes = [(member.sae, member.sites) for member in run.trained]
    return list(zip(run.trained, evaluate_together(saes, run.store, run.held_out), strict=True))


def due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def checkpoint_is_due(run: Run) -> bool:
    minutes = run.cfg.checkpoint_every_minutes
    by_time = minutes is not None and time.monotonic() - run.last_checkpoint_time >= 60 * minutes
    return by_time or due(run.step, run.cfg.checkpoint_every_steps)


def snapshot_steps(cfg: LanguageModelSAERunnerConfig) -> set[int]:
    """`n_checkpoints` steps that cut the run into equal parts; the end of the last part is the final save."""
    return {cfg.total_training_steps * i // (cfg.n_checkpoints + 1) for i in range(1, cfg.n_checkpoints + 1)} - {0}


def check_finite(run: Run, member: Member, weights: bool = False) -> None:
    """NonFiniteLoss, with what to do, if the loss of any step (or, if asked, a weight now) is not finite.

    Where other autoencoders are still in training, this one's is given up with a message, and theirs goes on.
    """
    try:
        member.trainer.check_finite()
        if weights:
            member.trainer.check_weights()
    except NonFiniteLoss as error:
        message = (
            f"step {run.step}: {error}. Last good checkpoint: {run.last_checkpoint or 'none was saved yet'}. "
            f"Lower lr (now {member.trainer.lr(run.step - 1):.3g}), or raise lr_warm_up_steps, and begin anew with "
            'resume="never".'
        )
        if run.trained == [member]:
            raise NonFiniteLoss(message) from error
        member.failure = message
        tqdm.write(f"{member.name} is given up at {message}")


def stop_here(run: Run, stop: StopRequest) -> None:
    assert stop.signal is not None
    saved = save(run)
    where = f"saved {saved}" if saved else "NOT saved (see above)"
    raise TrainingInterrupted(
        f"Stopped by {stop.signal.name} after step {run.step} of {run.cfg.total_training_steps}, {where}. The same "
        f"command continues it, and so does: python -m sae_training resume {run.folder.path}",
        exit_code=128 + stop.signal,
    )


def resample_dead_latents(run: Run, member: Member) -> None:
    """Resampling, if the config asks for it; not in the second half of the run, which newcomers could not learn in."""
    if member.cfg.feature_sampling_method is None or run.step > run.cfg.total_training_steps // 2:
        return
    n = member.trainer.resample(*run.store.sample(RESAMPLE_ROWS, member.sites), run.step)
    member.logger.log({"metrics/n_resampled_neurons": n}, run.step, run.n_training_tokens)


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


@torch.no_grad()
def evaluate_run(path: str | Path) -> dict[str, float]:
    """Evaluate the autoencoder of the run in `path` on its held-out tokens, as the run itself did at its end."""
    path = Path(path)
    cfg = read_run_config(path)
    sae = SparseAutoencoder.load_from_pretrained(path)
    model = load_language_model(cfg.model_name, str(sae.device), cfg.lm_dtype)
    store = ActivationsStore(without_cache(sae.cfg), model)
    tokens = store.held_out_tokens()
    if len(tokens) == 0:
        raise ValueError(
            f"{path}: this run holds no text out (n_eval_batches=0), so there is nothing to evaluate it on."
        )
    return evaluate(sae, store, tokens)
