"""Trains an autoencoder on synthetic data whose dictionary is known, and scores what it found.

toy_model_sae_runner(cfg) -> toy_model (the dictionary) -> train (SAETrainer, as for language models) -> score -> files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from sae_training.config.io import config_to_dict, with_defaults
from sae_training.config.toy import SAEToyModelRunnerConfig
from sae_training.machine.files import write_text
from sae_training.machine.phases import phase, progress_bar
from sae_training.run.folder import RunFolder, free_folder
from sae_training.run.logger import RunLogger
from sae_training.run.progress import figures_of
from sae_training.run.record import Record
from sae_training.run.remarks import what_is_wrong
from sae_training.run.wandb_run import WandbOptions
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.toy_model_runner.data import (
    ToyModel,
    ToyModelGenerator,
    random_directions,
    scaled_to_sum,
    zipf_weights,
)
from sae_training.toy_model_runner.picture import write_picture
from sae_training.toy_model_runner.scores import Scores, score
from sae_training.training.metrics import training_metrics
from sae_training.training.thresholds import start_thresholds
from sae_training.training.trainer import SAETrainer

SCORES_FILE, PICTURE_FILE = "scores.json", "picture.html"
ROWS_FOR_STARTING_VALUES = 8192  # of the decoder bias, and of the thresholds of jumprelu


class ToyModelResult(NamedTuple):
    """What `toy_model_sae_runner` returns."""

    sparse_autoencoder: SparseAutoencoder
    scores: dict[str, float]
    folder: Path


def toy_model_sae_runner(cfg: SAEToyModelRunnerConfig) -> ToyModelResult:
    """Draw a dictionary, train an autoencoder on rows made from it, and compare the two.

    The folder (`runs/<name>`, numbered if that name is taken) holds config.json, metrics.jsonl, scores.json,
    picture.html and the weights, which `SparseAutoencoder.load_from_pretrained(folder)` reads.
    """
    model = toy_model(cfg)
    folder = RunFolder(free_folder(Path(cfg.run_dir) / cfg.resolved_run_name.replace("/", "_")), cfg, "toy")
    try:
        with phase("training", has_bar=True):
            sae = train(cfg, model, folder.record)
        with phase("scoring"):
            scores = score(sae, model, ToyModelGenerator(model, cfg.seed + 2, cfg.device), cfg.n_eval_rows)
            write_text(folder.path / SCORES_FILE, json.dumps(scores.figures, indent=2) + "\n")
        with phase("drawing the picture"):
            picture = (scores.cosines, scores.matched, scores.f1, scores.frequencies)
            write_picture(folder.path / PICTURE_FILE, folder.path.name, *picture)
        for remark in what_is_wrong(with_defaults(cfg), cfg.total_training_steps, evaluation_of(scores)).values():
            tqdm.write(f"Something is wrong: {remark}.")
        folder.write_status("finished", **folder.record.figures)
    except BaseException as error:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        folder.write_status(state, **folder.record.figures)
        raise
    finally:
        folder.release()
    return ToyModelResult(sae, scores.figures, folder.path)


def evaluation_of(scores: Scores) -> dict[str, float]:
    """Return the scores that an evaluation on held-out text has too, under its names."""
    figures = scores.figures
    return scores.base | {
        "metrics/eval_explained_variance": figures["explained_variance"],
        "metrics/eval_l0": figures["l0"],
    }


def toy_model(cfg: SAEToyModelRunnerConfig) -> ToyModel:
    """Return the dictionary that `cfg` describes. Its features in order: parents, children, groups, pairs, others."""
    n = cfg.n_features
    n_children = cfg.n_parents * cfg.children_per_parent
    first = cfg.n_parents + n_children
    parents = torch.full((n,), -1)
    parents[cfg.n_parents : first] = torch.arange(n_children) % max(1, cfg.n_parents)
    size, n_groups = cfg.correlated_group_size, cfg.n_correlated_groups
    groups = [range(start, start + size) for start in range(first, first + n_groups * size, size)]
    first += n_groups * size
    pairs = [(first + 2 * i, first + 2 * i + 1) for i in range(cfg.n_anticorrelated_pairs)]

    weights = zipf_weights(n, cfg.zipf_exponent if cfg.frequencies == "zipf" else 0.0)
    weights = torch.where(parents >= 0, cfg.child_probability * weights[parents.clamp_min(0)], weights)
    bias = cfg.bias_norm * random_directions(1, cfg.n_hidden, cfg.seed + 3)[0]
    return ToyModel(
        directions=random_directions(n, cfg.n_hidden, cfg.seed, cfg.max_cosine),
        probabilities=scaled_to_sum(weights, cfg.mean_active_features),
        groups=groups,
        correlation=cfg.correlation,
        exclusive_pairs=pairs,
        parents=parents,
        magnitudes=cfg.magnitudes,
        bias=bias if cfg.bias_norm > 0 else None,
        noise_std=cfg.noise_std,
    )


def train(cfg: SAEToyModelRunnerConfig, model: ToyModel, record: Record) -> SparseAutoencoder:
    """Train on fresh rows at every step, and write metrics and weights to the folder of `record`."""
    folder = record.folder
    run_cfg = with_defaults(cfg)
    data = ToyModelGenerator(model, cfg.seed + 1, cfg.device)
    sae = SparseAutoencoder(run_cfg)
    sample = data.next_batch(ROWS_FOR_STARTING_VALUES).rows
    sae.initialize_b_dec(sample, cfg.b_dec_init_method)
    if remark := start_thresholds(sae, sample):
        tqdm.write(f"{remark}.")
    trainer = SAETrainer(sae, run_cfg)
    logger = RunLogger(
        folder,
        config=config_to_dict(cfg),
        wandb=WandbOptions.of_member(cfg, folder, folder) if cfg.log_to_wandb else None,
        notify=tqdm.write,
    )
    with logger, progress_bar(folder.name, cfg.total_training_steps, "steps", leave=True) as bar:
        for step in range(1, cfg.total_training_steps + 1):
            result = trainer.step(data.next_batch(cfg.train_batch_size).rows, step - 1)
            if step % cfg.wandb_log_frequency == 0 or step == cfg.total_training_steps:
                trainer.check_finite()
                rows = step * cfg.train_batch_size
                metrics = training_metrics(result, trainer.tracker, rows)
                logger.log(metrics, step, rows)
                record.progress(step, cfg.total_training_steps, cfg.train_batch_size, **figures_of([metrics]))
            if step % cfg.feature_sampling_window == 0:
                trainer.tracker.start_new_window()
            bar.update(1)
    trainer.take_average()
    trainer.check_weights()
    sae.eval()
    sae.save_model(folder)
    return sae
