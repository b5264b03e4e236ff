"""The main job: train sparse autoencoders on a language model's activations, as one config says.

language_model_sae_runner(cfg) -> open_run (model, store, trainers, folder) -> train (the loop) -> finish (final/)
"""

from __future__ import annotations

import dataclasses
import datetime
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.auto import IN_PROPORTION
from sae_training.config.io import config_to_dict
from sae_training.config.sweep import is_several, variants, with_layers
from sae_training.language_model.compile import compile_blocks
from sae_training.language_model.load import LanguageModel, language_model_dtype, model_of
from sae_training.language_model.sites import find_sites, merged, with_widths
from sae_training.machine.interrupt import StopAsked, StopRequest, TrainingInterrupted
from sae_training.machine.paths import command, with_absolute_paths
from sae_training.machine.phases import counted_phases, phase
from sae_training.machine.precision import encoder_dtype
from sae_training.machine.run_files import SNAPSHOTS
from sae_training.machine.terminal import lasting
from sae_training.parallel.agreement import check_alike, code
from sae_training.parallel.deal import Deal
from sae_training.parallel.division import Division, check_optimizer, check_rows, division
from sae_training.parallel.ranks import agree_on_stops, joined, n_ranks, of_first
from sae_training.run.background import Background
from sae_training.run.environment import check_reads, read_environment, reads_of, threads_of
from sae_training.run.finish import finish
from sae_training.run.folder import (
    RunFolder,
    check_paths,
    choose_run_folder,
    is_finished,
    is_member_folder,
    read_run_config,
)
from sae_training.run.memory_plan import check_memory, plan_memory
from sae_training.run.save import once_there_is_room, save, save_weights_folder, saved_first, saved_now
from sae_training.run.start import Singles, open_run
from sae_training.run.state import Due, Member, Run, check_any_left, check_finite
from sae_training.run.watch import evaluate_now, log_norms, log_sparsity, look_out
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.dead_latent_losses import n_auxk_rows
from sae_training.training.metrics import training_metrics
from sae_training.training.schedules import due, snapshot_steps
from sae_training.training.trainer import check_trainable, part_size

SAVING_VARIES = 1.5  # how much longer a checkpoint may take than the last one

RESAMPLE_ROWS = 16_384  # of the buffer, from which resampling draws its directions


def language_model_sae_runner(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel | None = None, dataset: Any = None
) -> SparseAutoencoder | dict[str, SparseAutoencoder]:
    """Train the autoencoder that `cfg` describes, or continue its unfinished run, and return it.

    A config with lists describes several autoencoders, which are trained together from one pass over the language model
    and come back by name; of several processes under torchrun, each returns what it has trained: with parallel layers
    its own autoencoders, with latents its part of each, which encodes nothing once the job is over. `model` (a
    HookedTransformer or TransformerBridge) and `dataset` (a `datasets` object) stand in for those that the config
    names. The run's folder is `runs/<run name>`; `run.folder.choose_run_folder` says when a run is continued.
    """
    run = run_config(cfg, model, dataset)
    return run.saes if is_several(run.cfg) else run.sae


@lasting()
@counted_phases()
def run_config(
    cfg: LanguageModelSAERunnerConfig,
    model: LanguageModel | None = None,
    dataset: Any = None,
    reads: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Do what `language_model_sae_runner` does, and return the whole run: its folder, store, members and figures.

    `reads`: fingerprints that model and text must have (`run.environment.reads_of`), or else nothing is trained.
    """
    check_trainable(cfg)
    with joined(cfg):
        return begin_run(cfg, model, dataset, reads)


def begin_run(
    cfg: LanguageModelSAERunnerConfig, model: LanguageModel | None, dataset: Any, reads: Mapping[str, Any]
) -> Run:
    """Train in a new folder or the unfinished run's, which the first rank chooses."""
    cfg = with_absolute_paths(cfg)
    with phase("loading the language model"):
        lm: LanguageModel = model_of(cfg, model)
    cfg = with_layers(cfg, lm.cfg.n_layers)
    cfg = with_proportions(with_precisions(cfg))
    if cfg.cached_activations_path is not None and cfg.use_cached_activations is False:
        tqdm.write(f"Live activations, not those in {cfg.cached_activations_path}: use_cached_activations is False.")
    singles = find_singles(cfg, lm)
    if not is_several(cfg):
        ((cfg, _),) = singles.values()  # with the model's widths
    return run_in_folder(of_first(lambda: choose_run_folder(cfg)), cfg, singles, lm, dataset, reads)


@lasting()
@counted_phases()
def resume_run(path: str | Path, **elsewhere: Any) -> Run:
    """Continue the unfinished run in the folder `path`, with the config it was started with.

    `elsewhere` are fields of the config that name what the run reads, and its device, where these have changed: a model
    or a text that lies elsewhere now must be the same (their fingerprints are compared).
    """
    path = Path(path)
    cfg = with_absolute_paths(dataclasses.replace(read_run_config(path), **elsewhere))
    check_trainable(cfg)
    if is_member_folder(path):
        raise ValueError(f"{path}: is one of several that are trained together; resume {path.parent}.")
    if is_finished(path):
        where = (
            f"its autoencoders are in folders of {path}" if is_several(cfg) else f"its autoencoder is in {path}/final"
        )
        raise ValueError(f"{path}: this run is finished; {where}.")
    check_paths(path, cfg)
    with joined(cfg):
        with phase("loading the language model"):
            model = model_of(cfg)
        return run_in_folder(path, cfg, find_singles(cfg, model), model, None)


def with_precisions(cfg: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Return `cfg` with the precisions that "auto" means here, so that another machine continues the run in them."""
    precisions: dict[str, Any] = {"lm_dtype": language_model_dtype(cfg.lm_dtype, cfg.device)}
    if cfg.dtype == torch.float32:  # in any other dtype, "auto" is that dtype on every machine
        device = torch.device(cfg.device)
        precisions["encoder_matmul_dtype"] = encoder_dtype(cfg.encoder_matmul_dtype, cfg.dtype, device)
    return dataclasses.replace(cfg, **precisions)


def with_proportions(cfg: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Return `cfg` with the defaults that are in proportion to the run as numbers of its own, for all autoencoders."""
    return dataclasses.replace(cfg, **{name: int(getattr(cfg, name)) for name in IN_PROPORTION})


def find_singles(cfg: LanguageModelSAERunnerConfig, model: LanguageModel) -> Singles:
    """Return the config of each autoencoder that `cfg` describes, widths filled in, and its sites in `model`."""
    found = {name: (single, find_sites(single, model)) for name, single in variants(cfg).items()}
    return {name: (with_widths(single, sites), sites) for name, (single, sites) in found.items()}


def run_in_folder(
    path: Path,
    cfg: LanguageModelSAERunnerConfig,
    all_singles: Singles,
    model: LanguageModel,
    dataset: Any,
    reads: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Begin the run in the folder `path`, or go on with it, and bring it to its end."""
    check_alike(config_to_dict(cfg) | {"the package's code": code()})
    with threads_of(path):
        return run_with_threads(path, cfg, all_singles, model, dataset, reads)


def run_with_threads(
    path: Path,
    cfg: LanguageModelSAERunnerConfig,
    all_singles: Singles,
    model: LanguageModel,
    dataset: Any,
    reads: Mapping[str, Any],
) -> Run:
    compile_blocks(model, cfg.compile_lm)
    costs = {name: float((single.d_sae or 0) * (single.d_in or 0)) for name, (single, _) in all_singles.items()}
    part = division(cfg.parallel, costs, cfg.mesh, datetime.timedelta(minutes=cfg.parallel_timeout_minutes))
    check_rows(part.share, smallest_part(cfg))
    if not part.shard.is_all:
        check_optimizer(single.optimizer for single, _ in all_singles.values())
        for single, _ in all_singles.values():
            part.shard.over(single.d_sae or 0)
    singles = {name: all_singles[name] for name in part.own_names}
    some_config = next(iter(singles.values()))[0]  # because they differ in nothing that the store asks for
    sites = merged(sites for _, sites in all_singles.values())
    deal, sites_of_ranks = deal_of(cfg, part), []
    if n_ranks() > 1 and deal is None:
        sites_of_ranks = [merged(all_singles[name][1] for name in names) for names in part.names]
    with phase("reading the text"):
        store = ActivationsStore(some_config, model, dataset, sites=sites, sites_of_ranks=sites_of_ranks, deal=deal)
    store.check_buffer_size()
    check_alike({"the text": store.text.documents.start()})
    plan = plan_memory(cfg, [single for single, _ in singles.values()], store)
    check_memory(plan, cfg, len(singles))
    tqdm.write(f"Memory of {len(singles)} autoencoders:\n{plan.table()}" if is_several(cfg) else plan.line())
    with phase("reading the text"):
        held_out = store.held_out_tokens()
    found = reads_of(store, held_out)
    check_reads(reads or of_first(lambda: read_environment(path)).get("reads", {}), found, cfg)
    # From here on there is a folder: bad data and too little memory have been told without one.
    with (
        counted_phases() as phases,
        RunFolder(path, cfg, reads=found) as folder,
        StopRequest(tqdm.write, by_agreement=n_ranks() > 1, saves=True) as stop,
        open_unless_stopped(cfg, singles, list(all_singles), folder, store, held_out, stop, part) as run,
    ):
        run.language_model = found["model_name"]
        run.background = Background() if plan.has_copy else None
        try:
            with phase("training", has_bar=True):
                train(run, stop)
            run.progress.close()
            finish(run)
        except StopAsked:
            stop_here(run, stop)
    store.text.say_skipped()
    tqdm.write(phases.line())
    return run


def deal_of(cfg: LanguageModelSAERunnerConfig, part: Division) -> Deal | None:
    """Return how the rows of batches are dealt out; None where this process computes and keeps all that it needs."""
    if part.share.is_all and part.shard.is_all:
        return None
    return Deal(part.share, part.shard, cfg.tokens_per_step, min(part_size(cfg), cfg.tokens_per_step))


def smallest_part(cfg: LanguageModelSAERunnerConfig) -> int:
    """Return how many rows are computed at once, at least: those that AuxK looks at in the last part of a batch."""
    size = part_size(cfg)
    return n_auxk_rows(min(cfg.tokens_per_step, cfg.tokens_per_step % size or size))


# --------------------------------------------------------------------------------------------------------- the loop


def open_unless_stopped(
    cfg: LanguageModelSAERunnerConfig,
    singles: Singles,
    names: list[str],
    folder: RunFolder,
    store: ActivationsStore,
    held_out: Tensor,
    stop: StopRequest,
    part: Division,
) -> Run:
    """Begin the run or go on with it. A stop while the first buffer fills costs nothing that was trained."""
    try:
        return open_run(cfg, singles, names, folder, store, held_out, part)
    except StopAsked:
        assert stop.signal is not None
        raise TrainingInterrupted(
            f"Stopped by {stop.signal.name} before a step was made. The same command begins again.",
            exit_code=128 + stop.signal,
        ) from None


def train(run: Run, stop: StopRequest) -> None:
    """Train the run's autoencoders, side by side on the same batches, until all steps are done or `stop` is asked."""
    cfg, store = run.cfg, run.store
    snapshots = snapshot_steps(cfg)
    if run.step == 0:
        log_norms(run)
    follow_up(run)  # what a stop has left of the step before
    while run.step < cfg.total_training_steps:
        with saved_first(run):
            store.advance(cfg.tokens_per_step, (cfg.total_training_steps - run.step) * cfg.tokens_per_step)
        run.step += 1  # from here on, `step` counts this one as finished
        logs = due(run.step, cfg.wandb_log_frequency)
        shown = []
        for member in run.trained:
            batch = store.batch(member.sites)
            result = member.trainer.step(batch.x, run.step - 1, batch.target)
            if logs or store.device.type == "cpu":  # on a GPU, to ask at every step would make the device wait
                check_finite(run, member)
            if logs and member.failure is None:
                shown.append(training_metrics(result, member.trainer.tracker, run.n_training_tokens))
                member.logger.log(shown[-1], run.step, run.n_training_tokens)
                rate = {"details/tokens_per_second": run.progress.tokens_per_s(run.step)}
                member.logger.log_beside(rate, run.step)
        if logs:
            check_any_left(run)
            run.progress.show(shown)
            look_out(run, shown)
            run.write_status("training")
        run.take_saved()
        run.pending = due_now(run, snapshots)
        follow_up(run)
        is_overdue = agree_on_stops(stop.takes_save() or time_is_up(run))
        if stop.signal is not None:
            stop_here(run, stop)
        if is_overdue or due(run.step, cfg.checkpoint_every_steps):
            save(run, in_background=True)
        run.progress.advance()


def due_now(run: Run, snapshots: set[int]) -> list[Due]:
    """Return what follows the step that has just been finished, in order."""
    cfg = run.cfg
    is_due: dict[Due, bool] = {
        "window": due(run.step, cfg.feature_sampling_window),
        "evaluation": due(run.step, cfg.eval_every) and run.step < cfg.total_training_steps,
        "snapshot": run.step in snapshots,
    }
    return [name for name, due_here in is_due.items() if due_here]


def follow_up(run: Run) -> None:
    """Do what is pending. A stop in the midst of it leaves the rest pending, for the run that goes on."""
    while run.pending:
        match run.pending[0]:
            case "window":
                close_window(run)
            case "evaluation":
                with saved_first(run):
                    evaluated = evaluate_now(run)
                for member, figures in evaluated:
                    member.logger.log(figures, run.step, run.n_training_tokens)
            case "snapshot":
                for member in run.recorded:
                    folder = member.folder / SNAPSHOTS / f"step_{run.step}"
                    once_there_is_room(run, partial(save_weights_folder, member, folder))
        run.pending.pop(0)


def close_window(run: Run) -> None:
    """End a window of firing counts: log it and, if the config asks for it, resample the latents that are dead."""
    if run.cfg.feature_sampling_method is not None:
        run.store.sample(RESAMPLE_ROWS)  # may have to make passes, and be stopped there: before anything changes
    for member in run.trained:
        member.trainer.tracker.start_new_window()
        log_sparsity(run, member)
        resample_dead_latents(run, member)


def time_is_up(run: Run) -> bool:
    """Return whether the last checkpoint is old enough for another one, by the clock of this process."""
    minutes = run.cfg.checkpoint_every_minutes
    if run.cfg.grace_seconds is not None and run.step == run.progress.first_step + 1:
        return True  # early, so that SIGTERM finds a checkpoint, and it is known how long one takes
    return minutes is not None and time.monotonic() - run.last_checkpoint_time >= 60 * minutes


def stop_here(run: Run, stop: StopRequest) -> None:
    """Save what is not saved yet, and raise TrainingInterrupted, saying how to continue."""
    assert stop.signal is not None
    run.take_saved(wait=True)
    left, needed = of_first(lambda: (time_left(run, stop), SAVING_VARIES * (run.save_seconds or 0)))
    if left is not None and left < needed and run.last_checkpoint is not None:
        where = f"not saved: {left:.1f} s are left, and saving may take {needed:.1f}; saved is {run.last_checkpoint}"
    else:
        saved = saved_now(run)
        where = f"saved {saved}" if saved else "NOT saved (see above)"
    what = "continues it" if run.step < run.cfg.total_training_steps else "evaluates what is trained"
    raise TrainingInterrupted(
        f"Stopped by {stop.signal.name} after step {run.step} of {run.cfg.total_training_steps}, {where}. The same "
        f"command {what}, and so does: {command('resume', run.folder.path)}",
        exit_code=128 + stop.signal,
    )


def time_left(run: Run, stop: StopRequest) -> float | None:
    """Return the seconds until the machine kills the process, after SIGTERM and where the config has grace_seconds."""
    if run.cfg.grace_seconds is None or stop.signal != signal.SIGTERM:
        return None
    return max(0.0, run.cfg.grace_seconds - (time.monotonic() - stop.asked_at))


def resample_dead_latents(run: Run, member: Member) -> None:
    """Resample, if the config asks for it; not in the second half of the run, because newcomers need time to learn."""
    if member.cfg.feature_sampling_method is None or run.step > run.cfg.total_training_steps // 2:
        return
    sample = run.store.sample(RESAMPLE_ROWS, member.sites)
    n = member.trainer.resample(sample.x, sample.target, run.step)
    member.logger.log({"metrics/n_resampled_neurons": n}, run.step, run.n_training_tokens)
