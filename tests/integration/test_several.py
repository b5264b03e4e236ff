"""Several autoencoders from one pass: each as if it were trained alone, killed and continued, and found again."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import D_IN, SMALL_RUN
from test_resume import start, step_of, wait_for

from sae_training import lm_runner
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import language_model_sae_runner, resume_run, run_config
from sae_training.report.run_page import report_run, write_report
from sae_training.run.evals import evaluate_run
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import NonFiniteLoss
from sae_training.utils import LMSparseAutoencoderSessionloader

LAYERS = {"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 2]}
REMEDIES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "seed": [1, 2], "k": 4, "auxk_coefficient": 0.25, "dead_feature_window": 1},
    "standard and gated": {"architecture": ["standard", "gated"], "lr": [1e-3, "auto"]},
    "scaled": {"normalize_activations": "expected_average_only_in", "expansion_factor": [1, 2]},
    "resampled": {
        "feature_sampling_method": "anthropic",
        "l1_coefficient": [1e-3, 0.1],
        "exclude_special_tokens": True,
    },
    "transcoders": {
        "hook_point": "blocks.{layer}.ln2.hook_normalized",
        "target_hook_point": "blocks.{layer}.hook_mlp_out",
        "architecture": ["topk", "batchtopk"],
    },
}


def assert_same_weights(one: SparseAutoencoder, other: SparseAutoencoder) -> None:
    found, expected = dict(one.weights()), dict(other.weights())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("case", REMEDIES)
def test_each_has_the_weights_it_would_have_alone(case: str, small_config: Callable, demo_model: Any) -> None:
    changes = LAYERS | REMEDIES[case]
    run = run_config(small_config(**changes, run_name="together"), demo_model)
    assert len(run.saes) == len(run.members) > 2
    for member in run.members:
        alone = {name: getattr(member.cfg, name) for name in changes}
        single = language_model_sae_runner(small_config(**alone, run_name=f"alone-{member.name}"), demo_model)
        assert isinstance(single, SparseAutoencoder)
        assert_same_weights(run.saes[member.name], single)
        (rows,) = [path / "metrics.jsonl" for path in run.folder.path.parent.glob(f"alone-{member.name}")]
        assert (member.folder / "metrics.jsonl").read_bytes() == rows.read_bytes()


def test_what_a_run_of_several_leaves(small_config: Callable, demo_model: Any) -> None:
    found = language_model_sae_runner(small_config(**LAYERS, architecture="topk", k=[4, 8]), demo_model)
    assert isinstance(found, dict)
    names = ["layer0-k4", "layer0-k8", "layer2-k4", "layer2-k8"]
    assert list(found) == names
    run = Path(small_config().run_dir) / "run"
    evaluations = json.loads((run / "final" / "evaluation.json").read_text())
    assert list(evaluations) == names
    page = (run / "report.html").read_text()
    assert "Explained variance by layer" in page
    for name in names:
        assert name in page
        assert "Explained variance" in write_report(run / name).read_text()
        model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run / name)
        assert_same_weights(sae, found[name])
        assert store.next_batch().shape == (64, D_IN)
        for key, value in evaluate_run(run / name).items():
            assert value == pytest.approx(evaluations[name][key], rel=1e-5, abs=1e-6), (name, key)
    with pytest.raises(FileNotFoundError, match="holds the folders of 4 autoencoders.*layer0-k4"):
        SparseAutoencoder.load_from_pretrained(run)


def test_inputs_that_share_a_target_are_scaled_each(small_config: Callable, demo_model: Any) -> None:
    hooks = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_resid_mid"]
    changes: dict[str, Any] = {"target_hook_point": "blocks.1.hook_mlp_out", "architecture": "topk"}
    changes |= {"normalize_activations": "expected_average_only_in"}
    run = run_config(small_config(**changes, hook_point=hooks), demo_model)
    for hook in hooks:
        alone = run_config(small_config(**changes, hook_point=hook, run_name=f"alone-{hook}"), demo_model)
        assert_same_weights(run.saes[hook], alone.sae)


def test_an_unfinished_run_of_several(small_config: Callable, demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its members load from its checkpoints, and are not taken for runs of their own."""
    cfg = small_config(**LAYERS, checkpoint_every_steps=3)
    monkeypatch.setattr(lm_runner, "finish", lambda run: None)
    run = run_config(cfg, demo_model)
    folder = run.folder.path
    sae = SparseAutoencoder.load_from_pretrained(folder / "layer2")
    assert_same_weights(sae, run.saes["layer2"])
    with pytest.raises(ValueError, match="one of several that are trained together; resume .*run"):
        resume_run(folder / "layer2")
    page = report_run(folder)
    assert page == folder / "runs.html"
    assert all(f'"name": "{name}"' in page.read_text() for name in ("layer0", "layer2"))
    assert "Explained variance" in report_run(folder / "layer2").read_text()


def test_one_that_diverges_does_not_stop_the_others(small_config: Callable, demo_model: Any) -> None:
    changes: dict[str, Any] = {"architecture": "topk", "lr_scheduler_name": "constant"}
    run = run_config(small_config(**changes, lr=[1e-3, 1e30]), demo_model)
    good, bad = run.members
    assert good.failure is None and bad.failure is not None
    assert list(run.saes) == ["lr-0.001"]
    status = json.loads((run.folder.path / "status.json").read_text())
    assert status["state"] == "finished"
    assert "Lower lr" in status["failed"]["lr-1e+30"]
    assert not (bad.folder / "final").exists()
    alone = run_config(small_config(**changes, lr=1e-3, run_name="alone"), demo_model)
    assert_same_weights(good.folded(), alone.sae)
    with pytest.raises(NonFiniteLoss):
        run_config(small_config(**changes, lr=[1e29, 1e30], run_name="none"), demo_model)


def test_members_are_runs_of_one_wandb_group(small_config: Callable, demo_model: Any) -> None:
    run = run_config(small_config(**LAYERS, log_to_wandb=True, wandb_mode="offline"), demo_model)
    ids = {(member.folder / "wandb_run_id.txt").read_text() for member in run.members}
    assert len(ids) == 2
    for member in run.members:
        (log,) = member.folder.glob("wandb/offline-run-*/run-*.wandb")
        content = log.read_bytes()
        assert b"losses/mse_loss" in content
        assert b"run/" + member.name.encode() in content


@pytest.mark.slow
def test_kills_change_nothing(tmp_path: Path) -> None:
    changes = {**SMALL_RUN, **LAYERS, "architecture": ["topk", "standard"], "k": 8, "auxk_coefficient": "auto"}
    changes |= {"total_training_tokens": 60 * 64, "checkpoint_every_steps": 3, "dead_feature_window": 1}
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for name, folder in folders.items():
        folder.mkdir()
        cfg = LanguageModelSAERunnerConfig(**{**changes, "run_dir": str(folder)})
        n_kills = 0
        while True:
            process = start(cfg, folder)
            if name == "killed" and n_kills < 4:
                wanted = 10 * n_kills + random.randint(4, 10)
                run = folder / "run"
                if wait_for(lambda process=process, run=run, wanted=wanted: step_of(run, process) >= wanted, process):
                    time.sleep(random.uniform(0, 0.1))
                    process.send_signal(signal.SIGKILL)
                    n_kills += 1
            _, err = process.communicate(timeout=300)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, err
        assert name == "whole" or n_kills == 4
    members = sorted(path.parent.parent.name for path in folders["whole"].glob("run/*/final/sae.safetensors"))
    assert members == ["layer0-standard", "layer0-topk", "layer2-standard", "layer2-topk"]
    for member in members:
        for file in ("final/sae.safetensors", "final/evaluation.json", "metrics.jsonl"):
            whole, killed = (folder / "run" / member / file for folder in folders.values())
            assert whole.read_bytes() == killed.read_bytes(), (member, file)
