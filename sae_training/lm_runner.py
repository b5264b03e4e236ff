"""The main job: train a sparse autoencoder on a language model's activations, as one config says.

language_model_sae_runner(cfg) -> open_run (model, store, trainer, folder) -> train (the loop) -> finish (final/)
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_training import checkpoint
from sae_training.activations_store import ActivationsStore, with_widths
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config_checks import FIXED_K
from sae_training.config_io import config_to_dict
from sae_training.conversions import fold_decoder_norms, fold_input_scale
from sae_training.evals import evaluate
from sae_training.interrupt import StopRequest, TrainingInterrupted
from sae_training.language_model import (
    LanguageModel,
    fingerprint,
    language_model_dtype,
    load_language_model,
)
from sae_training.metrics import sparsity_metrics, training_metrics
from sae_training.optim import check_installed
from sae_training.progress import Progress
from sae_training.report import write_report
from sae_training.run_folder import RunFolder, choose_run_folder, read_run_config, with_absolute_paths
from sae_training.run_logger import RunLogger
from sae_training.sparse_autoencoder import SparseAutoencoder, encoder_dtype
from sae_training.summary import summary
from sae_training.trainer import NonFiniteLoss, SAETrainer
from sae_training.weights import CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE, load_weights, write_safetensors, write_text

EVALUATION_FILE = "evaluation.json"
SAMPLE_ROWS = 32_768  # of the buffer, from which b_dec starts and scales are measured; as many as Gao et al. 2024 use
RESAMPLE_ROWS = 16_384  # of the buffer, from which resampling draws its directions


@dataclass
class Run:
    """Everything with state in a training run; `step` counts finished optimizer steps."""

    cfg: LanguageModelSAERunnerConfig
    folder: RunFolder
    store: ActivationsStore
    trainer: SAETrainer
    logger: RunLogger
    progress: Progress
    held_out: Tensor
    step: int = 0
    last_checkpoint: Path | None = None
    last_checkpoint_time: float = field(default_factory=time.monotonic)

    @property
    def sae(self) -> SparseAutoencoder:
        """The autoencoder for activations as the model has them: what is in training, or where training scales its
        batches, a copy with the scales folded in.
        """
        if not self.is_scaled:
            return self.trainer.sae
        folded = fold_input_scale(self.trainer.sae, self.store.scales[0], self.store.scales[-1])
        folded.cfg = dataclasses.replace(self.cfg, normalize_activations="none")
        return folded

    @property
    def is_scaled(self) -> bool:
        """Whether training scales its batches (`normalize_activations`)."""
        return any(scale != 1 for scale in self.store.scales)

    @property
    def n_training_tokens(self) -> int:
        return self.step * self.cfg.train_batch_size

    def write_status(self, state: str) -> None:
        self.progress.write_status(state, self.step, self.last_checkpoint)


def language_model_sae_runner(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel | None = None, dataset: Any = None
) -> SparseAutoencoder:
    """Train what `cfg` describes, or continue its unfinished run, and return the trained autoencoder.

    `model` (a HookedTransformer or TransformerBridge) and `dataset` (a `datasets` object) stand in for those that the
    config names. The run's folder is runs/<run name>; see `run_folder.choose_run_folder` for when a run is continued.
    """
    return run_config(cfg, model, dataset).sae


def run_config(cfg: LanguageModelSAERunnerConfig, model: LanguageModel | None = None, dataset: Any = None) -> Run:
    """`language_model_sae_runner`, for callers who want the run and its folder too."""
    check_installed(cfg.optimizer)
    cfg = with_absolute_paths(cfg)
    if model is None:
        model = load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype)
    cfg = with_widths(cfg, model)
    # Said in the folder, so that another machine computes in the same precisions.
    precisions: dict[str, Any] = {"lm_dtype": language_model_dtype(cfg.lm_dtype, cfg.device)}
    if cfg.dtype == torch.float32:  # elsewhere "auto" is dtype on every machine
        precisions["encoder_matmul_dtype"] = encoder_dtype(
            cfg.encoder_matmul_dtype, cfg.dtype, torch.device(cfg.device)
        )
    cfg = dataclasses.replace(cfg, **precisions)
    return run_in_folder(choose_run_folder(cfg), cfg, model, dataset)


def resume_run(path: str | Path) -> Run:
    """Continue the unfinished run in the folder `path`, with the config it was started with."""
    path = Path(path)
    cfg = read_run_config(path)
    if (path / "final").is_dir():
        raise ValueError(f"{path}: this run is finished; its autoencoder is in {path / 'final'}.")
    return run_in_folder(path, cfg, load_language_model(cfg.model_name, cfg.device, cfg.lm_dtype), None)


def run_in_folder(path: Path, cfg: LanguageModelSAERunnerConfig, model: LanguageModel, dataset: Any) -> Run:
    store = ActivationsStore(cfg, model, dataset)  # before the folder: bad data leaves nothing behind
    store.check_buffer_size()
    held_out = store.held_out_tokens()
    folder = RunFolder(path, cfg)
    try:
        try:
            run = open_run(cfg, folder, store, held_out)
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
            run.logger.close()
        return run
    finally:
        folder.release()


# --------------------------------------------------------------------------------------------------------- the loop


def train(run: Run, stop: StopRequest) -> None:
    cfg, trainer = run.cfg, run.trainer
    snapshots = snapshot_steps(cfg)
    while run.step < cfg.total_training_steps:
        x, target = run.store.next_pair()
        result = trainer.step(x, run.step, target)
        run.step += 1  # from here on, `step` counts finished steps
        logs = due(run.step, cfg.wandb_log_frequency)
        if logs or run.store.device.type == "cpu":  # elsewhere it would make the device wait at every step
            check_finite(run)
        if logs:
            metrics = training_metrics(result, trainer.tracker, run.n_training_tokens)
            run.logger.log(metrics, run.step, run.n_training_tokens)
            run.logger.log_timing({"details/tokens_per_second": run.progress.tokens_per_s(run.step)}, run.step)
            run.progress.show(metrics)
            run.write_status("training")
        if due(run.step, cfg.feature_sampling_window):
            trainer.tracker.start_new_window()
            log_sparsity(run)
            resample_dead_latents(run)
        if due(run.step, cfg.eval_every) and run.step < cfg.total_training_steps and len(run.held_out):
            run.logger.log(evaluate_now(run), run.step, run.n_training_tokens)
        if run.step in snapshots:
            save_weights_folder(run, run.folder.path / "snapshots" / f"step_{run.step}", aliases=())
        if stop.signal is not None:
            stop_here(run, stop)
        if checkpoint_is_due(run):
            save(run)
        run.progress.advance()


def evaluate_now(run: Run) -> dict[str, float]:
    """The figures of `evaluate`; none with evaluation off (eval_every_steps=0) or no text held out
    (n_eval_batches=0).
    """
    if run.cfg.eval_every == 0 or len(run.held_out) == 0:
        return {}
    return evaluate(run.sae, run.store, run.held_out)


def due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def checkpoint_is_due(run: Run) -> bool:
    minutes = run.cfg.checkpoint_every_minutes
    by_time = minutes is not None and time.monotonic() - run.last_checkpoint_time >= 60 * minutes
    return by_time or due(run.step, run.cfg.checkpoint_every_steps)


def snapshot_steps(cfg: LanguageModelSAERunnerConfig) -> set[int]:
    """`n_checkpoints` steps that cut the run into equal parts; the end of the last part is the final save."""
    return {cfg.total_training_steps * i // (cfg.n_checkpoints + 1) for i in range(1, cfg.n_checkpoints + 1)} - {0}


def check_finite(run: Run, weights: bool = False) -> None:
    """NonFiniteLoss, with what to do, if the loss of any step (or, if asked, a weight now) is not finite."""
    try:
        run.trainer.check_finite()
        if weights:
            run.trainer.check_weights()
    except NonFiniteLoss as error:
        raise NonFiniteLoss(
            f"step {run.step}: {error}. Last good checkpoint: {run.last_checkpoint or 'none was saved yet'}. "
            f"Lower lr (now {run.trainer.lr(run.step - 1):.3g}), or raise lr_warm_up_steps, and begin anew with "
            'resume="never".'
        ) from error


def stop_here(run: Run, stop: StopRequest) -> None:
    assert stop.signal is not None
    saved = save(run)
    where = f"saved {saved}" if saved else "NOT saved (see above)"
    raise TrainingInterrupted(
        f"Stopped by {stop.signal.name} after step {run.step} of {run.cfg.total_training_steps}, {where}. The same "
        f"command continues it, and so does: python -m sae_training resume {run.folder.path}",
        exit_code=128 + stop.signal,
    )


def resample_dead_latents(run: Run) -> None:
    """Resampling, if the config asks for it; not in the second half of the run, which newcomers could not learn in."""
    if run.cfg.feature_sampling_method is None or run.step > run.cfg.total_training_steps // 2:
        return
    n = run.trainer.resample(*run.store.sample(RESAMPLE_ROWS), run.step)
    run.logger.log({"metrics/n_resampled_neurons": n}, run.step, run.n_training_tokens)


def log_sparsity(run: Run) -> None:
    """Log how often latents fired, in the window of firing counts that has just ended or (at the end) lately."""
    log_frequency = run.trainer.tracker.log_frequency()
    run.logger.log(sparsity_metrics(log_frequency, run.cfg.dead_feature_threshold), run.step, run.n_training_tokens)
    run.logger.log_histogram("plots/feature_density_line_chart", log_frequency, run.step)


# -------------------------------------------------------------------------------------------------- start and resume


def open_run(cfg: LanguageModelSAERunnerConfig, folder: RunFolder, store: ActivationsStore, held_out: Tensor) -> Run:
    """A new run, or the one in `folder` as its newest undamaged checkpoint has it."""
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg)
    latest = checkpoint.newest_valid(folder.checkpoints, notify=tqdm.write)
    state: dict[str, Any] = {"step": 0, "metrics_bytes": 0}
    if latest:
        parts, state = checkpoint.load_checkpoint(latest)
        check_same_language_model(state["language_model"], store.model, latest)
        trainer.load_state_dict({"weights": parts["sae"], **parts["trainer"]})
        store.load_state_dict(parts["store"])
        tqdm.write(f"Continuing {folder.path} after step {state['step']}.")
    else:
        check_room_for_checkpoints(cfg, folder, trainer, store)
        start_weights(trainer.sae, cfg, store)
    logger = RunLogger(
        folder.path,
        config=config_to_dict(cfg),
        log_to_wandb=cfg.log_to_wandb,
        wandb_project=cfg.wandb_project,
        wandb_entity=cfg.wandb_entity,
        run_name=folder.path.name,
        wandb_mode=cfg.wandb_mode,
        resume_at=state["metrics_bytes"],
        notify=tqdm.write,
    )
    progress = Progress(cfg, folder, first_step=state["step"])
    run = Run(cfg, folder, store, trainer, logger, progress, held_out, state["step"], latest)
    run.write_status("training")
    return run


def check_same_language_model(expected: str, model: LanguageModel, latest: Path) -> None:
    found = fingerprint(model)
    if found != expected:
        raise ValueError(
            f"model_name: the language model's weights (fingerprint {found}) are not those that {latest} was trained "
            "on "
            f'({expected}); give the same model or precision, or begin a new run with resume="never".'
        )


def start_weights(sae: SparseAutoencoder, cfg: LanguageModelSAERunnerConfig, store: ActivationsStore) -> None:
    """From the pretrained file if the config names one, else with b_dec set from a sample of the activations."""
    if cfg.normalize_activations == "expected_average_only_in":
        store.measure_scales(SAMPLE_ROWS)
    if cfg.from_pretrained_path is None:
        x, target = store.sample(SAMPLE_ROWS)
        if sae.is_transcoder:
            sae.initialize_transcoder(x, target, cfg.b_dec_init_method)
        else:
            sae.initialize_b_dec(x, cfg.b_dec_init_method)
        return
    try:
        saved, tensors = load_weights(Path(cfg.from_pretrained_path))
    except (OSError, ValueError) as error:
        raise type(error)(f"from_pretrained_path: {error}") from error
    if (saved.target_hook_point is None) != (cfg.target_hook_point is None):
        kinds = ["an autoencoder" if c.target_hook_point is None else "a transcoder" for c in (saved, cfg)]
        raise ValueError(
            f"from_pretrained_path: it holds {kinds[0]}, expected {kinds[1]}, as target_hook_point has it; change one."
        )
    for name, sizes in (("W_enc", "(d_in, d_sae)"), ("W_dec", "(d_sae, d_out)")):
        found, expected = tuple(tensors[name].shape), tuple(sae.state_dict()[name].shape)
        if found != expected:
            raise ValueError(
                f"from_pretrained_path: its {name} is {found}, this config's {expected} {sizes}; set expansion_factor "
                "and hooks to match."
            )
    if tensors.keys() != sae.state_dict().keys():
        raise ValueError(
            f"from_pretrained_path: its tensors are {', '.join(tensors)}, those of architecture {sae.architecture} are "
            f"{', '.join(sae.state_dict())}; set architecture (and skip_connection) to that of the file."
        )
    sae.load_state_dict(tensors)
    in_training = fold_input_scale(sae, 1 / store.scales[0], 1 / store.scales[-1])
    if sae.has_unit_norm_decoder and sae.architecture in FIXED_K:
        in_training.set_decoder_norm_to_unit_norm()
    elif sae.has_unit_norm_decoder:
        in_training = fold_decoder_norms(in_training)
    sae.load_state_dict(in_training.state_dict())


def check_room_for_checkpoints(
    cfg: LanguageModelSAERunnerConfig, folder: RunFolder, trainer: SAETrainer, store: ActivationsStore
) -> None:
    """NotEnoughDisk if the checkpoints of this run, at their largest, cannot fit."""
    if cfg.checkpoint_every_minutes is None and cfg.checkpoint_every_steps is None:
        return
    weights = sum(p.numel() * p.element_size() for p in trainer.sae.parameters())
    buffer = store.n_rows * (sum(store.widths) * store.model.cfg.dtype.itemsize + 8)
    # One is written before the oldest is deleted; weights, and Adam's two moments, are in each, and where batches are
    # scaled the weights for raw activations too.
    copies = 3 if cfg.normalize_activations == "none" else 4
    checkpoint.check_free_disk(
        folder.path,
        (cfg.keep_checkpoints + 1) * (copies * weights + buffer) + weights,
        f"{cfg.keep_checkpoints + 1} checkpoints (keep_checkpoints, and one being written) need",
    )


# -------------------------------------------------------------------------------------------------------------- save


def save(run: Run) -> Path | None:
    """Save everything the run needs to go on as if it had not stopped; None, with a message, if the disk is full."""
    check_finite(run, weights=True)
    sae, trainer_state = run.sae, run.trainer.state_dict()
    if not run.is_scaled:
        trainer_state.pop("weights")  # they are those of `sae`
    # Loaders read the part "sae", resuming goes on from the weights of "trainer" where these are others.
    parts = {"sae": dict(sae.weights()), "trainer": trainer_state, "store": run.store.state_dict()}
    state = {"metrics_bytes": run.logger.position(), "language_model": fingerprint(run.store.model)}
    config_text = json.dumps(config_to_dict(sae.cfg), indent=2) + "\n"
    try:
        saved = checkpoint.save_checkpoint(
            run.folder.checkpoints, run.step, parts, state, extra_files={CONFIG_FILE: config_text}
        )
    except OSError as error:
        tqdm.write(f"Checkpoint not saved; the last one is {run.last_checkpoint or 'none'}. {error}")
        return None
    finally:
        run.last_checkpoint_time = time.monotonic()
    run.last_checkpoint = saved
    checkpoint.delete_old(run.folder.checkpoints, run.cfg.keep_checkpoints)
    run.write_status("training")
    return saved


def save_weights_folder(run: Run, folder: Path, aliases: tuple[str, ...], **texts: str) -> None:
    """Weights, config and log10 firing frequencies in `folder`, whole or not at all, and as wandb artifacts."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    run.sae.save_model(partial)
    log_frequency = run.trainer.tracker.log_frequency()
    write_safetensors(partial / SPARSITY_FILE, {"log_feature_sparsity": log_frequency})
    for name, text in texts.items():
        write_text(partial / f"{name}.json", text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)

    name = run.trainer.sae.get_name()
    metadata = config_to_dict(run.cfg)
    files = [folder / WEIGHTS_FILE, folder / CONFIG_FILE]
    run.logger.log_artifact(name, "model", files, metadata=metadata, aliases=aliases)
    run.logger.log_artifact(
        f"{name}_log_feature_sparsity", "log_feature_sparsity", [folder / SPARSITY_FILE], aliases=aliases
    )


def finish(run: Run) -> None:
    """Last evaluation, final/, report.html."""
    check_finite(run, weights=True)
    if not due(run.step, run.cfg.feature_sampling_window):
        log_sparsity(run)
    run.trainer.take_average()
    evaluation = evaluate_now(run) | {"sparsity/dead_features": int(run.trainer.tracker.dead().sum())}
    run.logger.log(evaluation, run.step, run.n_training_tokens)
    run.trainer.sae.eval()
    save_weights_folder(
        run, run.folder.final, aliases=("final_model",), evaluation=json.dumps(evaluation, indent=2) + "\n"
    )
    run.write_status("finished")
    write_report(run.folder.path)
    tqdm.write(summary(run.folder.path, evaluation, run.trainer.sae.d_sae))


@torch.no_grad()
def evaluate_run(path: str | Path) -> dict[str, float]:
    """Evaluate the autoencoder of the run in `path` on its held-out tokens, as the run itself did at its end."""
    path = Path(path)
    cfg = read_run_config(path)
    sae = SparseAutoencoder.load_from_pretrained(path)
    model = load_language_model(cfg.model_name, str(sae.device), cfg.lm_dtype)
    store = ActivationsStore(sae.cfg, model)
    tokens = store.held_out_tokens()
    if len(tokens) == 0:
        raise ValueError(
            f"{path}: this run holds no text out (n_eval_batches=0), so there is nothing to evaluate it on."
        )
    return evaluate(sae, store, tokens)
