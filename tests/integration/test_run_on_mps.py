"""Whole jobs on an "mps" device, which exists in `fake_mps` only, with the language model and its evaluation on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_mps import fake_mps
from small import SMALL_RUN

from sae_analysis.top_contexts import find_top_contexts
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model
from sae_training.lm_runner import language_model_sae_runner, run_config
from sae_training.toy_model_runner import SAEToyModelRunnerConfig, toy_model_sae_runner
from sae_training.utils import LMSparseAutoencoderSessionloader


@pytest.fixture(autouse=True)
def on_mps() -> Iterator[None]:
    with fake_mps():
        yield


@pytest.fixture(scope="module")
def mps_model() -> Any:
    with fake_mps():
        model = load_language_model("demo", "mps", "float32")
    assert {parameter.device.type for parameter in model.parameters()} == {"mps"}
    return model


def test_a_run_on_mps_is_evaluated_continued_and_loaded(
    small_config: Callable[..., LanguageModelSAERunnerConfig], mps_model: Any
) -> None:
    cfg = small_config(
        architecture="topk",
        k=4,
        feature_sampling_method="l2",
        checkpoint_every_steps=5,
        keep_checkpoints=3,
        device="mps",
    )
    sae = language_model_sae_runner(cfg, mps_model)
    folder = Path(cfg.run_dir) / "run"
    evaluation = json.loads((folder / "final" / "evaluation.json").read_text())
    for name in ("ce_loss_without_sae", "ce_loss_with_sae", "eval_l0"):
        assert evaluation[f"metrics/{name}"] > 0

    shutil.rmtree(folder / "final")  # as after a kill: the run goes on from its newest checkpoint
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    shutil.rmtree(newest)
    again = language_model_sae_runner(cfg, mps_model)
    assert torch.equal(again.W_dec.detach().cpu(), sae.W_dec.detach().cpu())

    model, loaded, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(folder)
    assert [str(place) for place in (model.cfg.device, store.device, loaded.device)] == ["mps:0", "mps", "mps:0"]
    assert find_top_contexts(loaded, store, store.get_batch_tokens()).density.mean() > 0


def test_several_autoencoders_train_on_mps_together(
    small_config: Callable[..., LanguageModelSAERunnerConfig], mps_model: Any
) -> None:
    cfg = small_config(
        architecture=["standard", "batchtopk", "jumprelu", "gated"], exclude_special_tokens=True, device="mps"
    )
    for sae in run_config(cfg, mps_model).saes.values():
        assert sae.device.type == "mps" and sae.W_dec.isfinite().all()


def test_a_cache_is_written_and_read_on_mps(
    small_config: Callable[..., LanguageModelSAERunnerConfig], mps_model: Any, tmp_path: Path
) -> None:
    shared = {name: SMALL_RUN[name] for name in ("model_name", "hook_point", "lm_dtype", "dataset_path")}
    shared |= {name: SMALL_RUN[name] for name in ("context_size", "store_batch_size", "n_eval_batches")}
    folder = str(tmp_path / "cache")
    cache_activations_runner(
        CacheActivationsRunnerConfig(
            **shared, total_training_tokens=1024, dtype="int8", device="mps", cached_activations_path=folder
        ),
        mps_model,
    )
    cfg = small_config(use_cached_activations=True, cached_activations_path=folder, device="mps")
    assert language_model_sae_runner(cfg, mps_model).W_dec.isfinite().all()


def test_a_toy_run_on_mps_is_scored(tmp_path: Path) -> None:
    cfg = SAEToyModelRunnerConfig(
        n_features=24, n_hidden=16, d_sae=48, k=2, train_batch_size=64, total_training_tokens=640, n_eval_rows=500,
        frequencies="zipf", n_parents=2, children_per_parent=2, n_correlated_groups=1, n_anticorrelated_pairs=1,
        bias_norm=1.0, noise_std=0.1, device="mps", run_dir=str(tmp_path),
    )  # fmt: skip
    assert 0 < toy_model_sae_runner(cfg).scores["mean_f1"] < 1
