"""Whole runs on the bundled language model: what they leave on disk, in wandb, and in the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import D_IN, D_SAE
from wandb_file import artifacts, history, wandb_files

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import language_model_sae_runner, run_config
from sae_training.machine.phases import counted_phases
from sae_training.report.metrics_file import read_metrics
from sae_training.run.evals import evaluate_run
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import NonFiniteLoss
from sae_training.utils import LMSparseAutoencoderSessionloader

MakeConfig = Callable[..., LanguageModelSAERunnerConfig]

TOPK = {"architecture": "topk", "k": 8, "auxk_coefficient": 1 / 32, "dead_feature_window": 1}
GHOST = {"use_ghost_grads": True, "dead_feature_window": 1, "l1_coefficient": 1e-2}


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "sae.safetensors")


def equal_weights(one: Path, other: Path) -> bool:
    a, b = final_weights(one), final_weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [{}, TOPK, GHOST], ids=["standard", "topk with auxk", "ghost gradients"])
def test_run_leaves_everything_the_readme_names(kind: dict, small_config: MakeConfig, demo_model: Any) -> None:
    run = run_config(small_config(**kind, n_checkpoints=2, checkpoint_every_steps=5), demo_model)
    folder = run.folder.path
    assert {p.name for p in folder.iterdir()} >= {"config.json", "metrics.jsonl", "status.json", "report.html"}
    assert {p.name for p in (folder / "final").iterdir()} == {
        "cfg.json",
        "sae.safetensors",
        "log_feature_sparsity.safetensors",
        "evaluation.json",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_5", "step_10"}
    assert {p.name for p in (folder / "snapshots").iterdir()} == {"step_4", "step_8"}
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["n_training_tokens"]) == ("finished", 12, 768)
    versions = json.loads((folder / "config.json").read_text())["versions"]
    assert versions["torch"].startswith(torch.__version__.split("+")[0])


def test_training_lowers_the_loss_and_evaluation_beats_ablation(small_config: MakeConfig, demo_model: Any) -> None:
    cfg = small_config(**TOPK, total_training_tokens=12_800, lr=2e-3)
    rows = read_metrics(run_config(cfg, demo_model).folder.path)
    losses = [row["losses/mse_loss"] for row in rows if "losses/mse_loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert rows[-1]["metrics/CE_loss_score"] > 0.5
    assert rows[-1]["metrics/eval_l0"] <= 8


RECIPE = {"lr": "auto", "lr_warm_up_steps": "auto", "lr_scheduler_name": "linearwarmupdecay"}


@pytest.mark.parametrize(("target", "changes"), [(8.0, {"lr": 3e-4}), (40.0, RECIPE)], ids=["slow", "recipe"])
def test_a_run_of_a_hundred_steps_ends_at_its_target_l0(
    target: float, changes: dict[str, Any], small_config: MakeConfig, demo_model: Any
) -> None:
    cfg = small_config(architecture="jumprelu", target_l0=target, total_training_tokens=100 * 64, **changes)
    rows = read_metrics(run_config(cfg, demo_model).folder.path)
    first, *_, last = [row["metrics/l0"] for row in rows if "metrics/l0" in row]
    assert first < 2 * target  # sparse at once, where half of the latents would be active without a sample
    assert last == pytest.approx(target, rel=0.2)  # of 64 rows
    assert rows[-1]["metrics/eval_l0"] == pytest.approx(target, rel=0.1)  # of 512 other rows


def test_a_run_says_that_its_coefficient_leaves_no_latent(
    small_config: MakeConfig, demo_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_config(small_config(architecture="jumprelu", l1_coefficient=100.0, total_training_tokens=128), demo_model)
    assert "l1_coefficient: found 100, expected less than 0.0" in capsys.readouterr().out


def test_a_run_shorter_than_the_sampling_window_keeps_its_log_sparsity(
    small_config: MakeConfig, demo_model: Any
) -> None:
    run = run_config(small_config(feature_sampling_window=2000), demo_model)
    saved = load_file(run.folder.final / "log_feature_sparsity.safetensors")["log_feature_sparsity"]
    assert saved.shape == (D_SAE,)
    assert saved.max() > -5


def test_logging_evaluation_and_checkpoints_never_change_the_weights(
    small_config: MakeConfig, demo_model: Any, tmp_path: Path
) -> None:
    busy = small_config(
        **TOPK,
        run_name="busy",
        wandb_log_frequency=1,
        eval_every_steps=1,
        checkpoint_every_steps=1,
        n_checkpoints=5,
        log_to_wandb=True,
        wandb_mode="offline",
    )
    quiet = small_config(
        **TOPK, run_name="quiet", wandb_log_frequency=1000, eval_every_steps=0, checkpoint_every_minutes=None
    )
    folders = [run_config(cfg, demo_model).folder.path for cfg in (busy, quiet)]
    assert len(read_metrics(folders[0])) > 20
    assert not (folders[1] / "checkpoints").exists()
    assert not [key for row in read_metrics(folders[1]) for key in row if key.startswith(("losses/", "metrics/ce_"))]
    assert equal_weights(*folders)


def test_sampling_window_never_changes_the_weights(small_config: MakeConfig, demo_model: Any) -> None:
    cfgs = [small_config(**TOPK, run_name=f"w{window}", feature_sampling_window=window) for window in (2, 1000)]
    assert equal_weights(*(run_config(cfg, demo_model).folder.path for cfg in cfgs))


def test_wandb_receives_every_key_of_the_mats_era(small_config: MakeConfig, demo_model: Any) -> None:
    cfg = small_config(log_to_wandb=True, wandb_mode="offline", n_checkpoints=1)
    run = run_config(cfg, demo_model)
    (file,) = wandb_files(run.folder.path)
    rows = history(file)
    keys = {key for row in rows for key in row}
    assert keys >= {
        "losses/mse_loss",
        "losses/l1_loss",
        "losses/ghost_grad_loss",
        "losses/overall_loss",
        "metrics/explained_variance",
        "metrics/explained_variance_std",
        "metrics/l0",
        "sparsity/mean_passes_since_fired",
        "sparsity/dead_features",
        "sparsity/revived_features",
        "details/n_training_tokens",
        "details/current_learning_rate",
        "metrics/mean_log10_feature_sparsity",
        "plots/activation_norm",
        "plots/feature_density_line_chart",
        "sparsity/below_1e-5",
        "sparsity/below_1e-6",
        "metrics/l2_norm",
        "metrics/l2_ratio",
        "metrics/CE_loss_score",
        "metrics/ce_loss_without_sae",
        "metrics/ce_loss_with_sae",
        "metrics/ce_loss_with_ablation",
    }
    # The same figures as in metrics.jsonl, which is the record.
    of_file = {row["step"]: row["losses/mse_loss"] for row in read_metrics(run.folder.path) if "losses/mse_loss" in row}
    of_wandb = {row["_step"]: row["losses/mse_loss"] for row in rows if "losses/mse_loss" in row}
    assert of_wandb == of_file
    name = f"sparse_autoencoder_demo_blocks.1.hook_resid_post_{D_SAE}"
    assert set(artifacts(file)) == {name, f"{name}_log_feature_sparsity"}


def test_loaded_session_gives_back_what_was_trained(small_config: MakeConfig, demo_model: Any) -> None:
    run = run_config(small_config(**TOPK, exclude_special_tokens=True), demo_model)
    model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run.folder.path)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), run.sae.parameters(), strict=True))
    assert sae.cfg == run.cfg
    tokens = store.get_batch_tokens()
    assert sae(store.get_activations(tokens)).sae_out.shape == (4, 16, D_IN)
    assert store.next_batch().shape == (64, D_IN)
    assert torch.equal(store.held_out_tokens(), run.held_out)
    assert model.cfg.d_model == D_IN


@pytest.mark.parametrize("part", ["final", "checkpoints/step_5", "snapshots/step_6", "final/sae.safetensors"])
def test_session_loads_from_every_saved_part(part: str, small_config: MakeConfig, demo_model: Any) -> None:
    run = run_config(small_config(checkpoint_every_steps=5, n_checkpoints=1), demo_model)
    path = run.folder.path / part
    _, sae, _ = LMSparseAutoencoderSessionloader.load_session_from_pretrained(path, model=demo_model)
    saved = load_file(path if path.is_file() else path / "sae.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sae.weights())


def test_new_session_has_an_untrained_autoencoder(small_config: MakeConfig, demo_model: Any) -> None:
    cfg = small_config(d_in=None)
    model, sae, store = LMSparseAutoencoderSessionloader(cfg).load_session(model=demo_model)
    assert model is demo_model
    assert sae.d_in == D_IN
    assert store.get_batch_tokens().shape == (4, 16)


def test_evaluate_run_repeats_the_final_evaluation(small_config: MakeConfig, demo_model: Any) -> None:
    run = run_config(small_config(), demo_model)
    saved = json.loads((run.folder.final / "evaluation.json").read_text())
    with counted_phases() as phases:
        again = evaluate_run(run.folder.path)
    assert again == {key: saved[key] for key in again}
    of_training = ["loading the language model", "reading the text", "evaluation"]
    assert list(phases.seconds) == ["other", "reading the autoencoder", *of_training]


def test_evaluate_run_takes_less_of_its_held_out_text_and_no_text_that_it_trained_on(
    small_config: MakeConfig, demo_model: Any
) -> None:
    run = run_config(small_config(n_eval_batches=2), demo_model)
    n_contexts = small_config().store_batch_size
    assert evaluate_run(run.folder.path)["base/contexts"] == 2 * n_contexts
    assert evaluate_run(run.folder.path, n_eval_batches=1)["base/contexts"] == n_contexts
    with pytest.raises(ValueError, match="n_eval_batches: found 3, expected at most 2, which this run held out"):
        evaluate_run(run.folder.path, n_eval_batches=3)
    assert evaluate_run(run.folder.path, n_eval_batches=3, dataset_path="demo")["base/contexts"] == 3 * n_contexts


def test_run_that_holds_out_no_text_trains_without_an_evaluation(small_config: MakeConfig, demo_model: Any) -> None:
    run = run_config(small_config(n_eval_batches=0), demo_model)
    assert len(run.held_out) == 0
    assert (run.folder.final / "sae.safetensors").is_file()
    rows = read_metrics(run.folder.path)
    assert not [key for row in rows for key in row if key.startswith(("metrics/ce_", "metrics/kl", "metrics/eval_"))]
    assert list(json.loads((run.folder.final / "evaluation.json").read_text())) == ["sparsity/dead_features"]
    with pytest.raises(ValueError, match="holds no text out .n_eval_batches=0."):
        evaluate_run(run.folder.path)


def test_fine_tuning_starts_from_the_given_weights_and_keeps_the_new_config(
    small_config: MakeConfig, demo_model: Any, tmp_path: Path
) -> None:
    first = run_config(small_config(), demo_model)
    # A learning rate so small that nothing moves: what comes out is what went in.
    cfg = small_config(run_name="tuned", from_pretrained_path=str(first.folder.path), lr=1e-12, l1_coefficient=5e-4)
    tuned = run_config(cfg, demo_model)
    assert tuned.cfg.l1_coefficient == 5e-4
    torch.testing.assert_close(tuned.sae.b_dec, first.sae.b_dec)
    torch.testing.assert_close(tuned.sae.W_enc, first.sae.W_enc)


def test_fine_tuning_keeps_the_function_of_a_decoder_with_other_norms(
    small_config: MakeConfig, demo_model: Any, tmp_path: Path
) -> None:
    first = run_config(small_config(), demo_model)
    with torch.no_grad():
        first.sae.W_dec[:100] *= 3
    first.sae.save_model(tmp_path / "other_norms")
    cfg = small_config(run_name="tuned", from_pretrained_path=str(tmp_path / "other_norms"), lr=1e-12)
    tuned = run_config(cfg, demo_model)
    x = first.store.next_batch()
    torch.testing.assert_close(tuned.sae(x).sae_out, first.sae(x).sae_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuned.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_fine_tuning_another_width_names_both_shapes(small_config: MakeConfig, demo_model: Any) -> None:
    first = run_config(small_config(), demo_model)
    cfg = small_config(run_name="tuned", from_pretrained_path=str(first.folder.path), expansion_factor=4)
    with pytest.raises(ValueError, match=rf"its W_enc is \({D_IN}, {D_SAE}\), this config's \({D_IN}, {2 * D_SAE}\)"):
        run_config(cfg, demo_model)


def test_run_in_float64_chooses_latents_in_float64(small_config: MakeConfig, demo_model: Any) -> None:
    run = run_config(small_config(dtype="float64"), demo_model)
    assert run.sae.W_enc.dtype == run.sae.encoder_dtype == torch.float64


def test_fine_tuning_another_architecture_names_both(small_config: MakeConfig, demo_model: Any) -> None:
    first = run_config(small_config(), demo_model)
    cfg = small_config(run_name="tuned", from_pretrained_path=str(first.folder.path), architecture="jumprelu")
    with pytest.raises(ValueError, match=r"those of architecture jumprelu are .*log_threshold"):
        run_config(cfg, demo_model)


def test_non_finite_loss_stops_before_the_update_and_names_the_last_checkpoint(
    small_config: MakeConfig, demo_model: Any
) -> None:
    # The first update makes weights of about 1e30, still finite; the squared error of the next step overflows.
    cfg = small_config(lr=1e30, lr_scheduler_name="constant", checkpoint_every_steps=1)
    with pytest.raises(
        NonFiniteLoss, match=r"step 2: the loss is not finite.*Last good checkpoint: .*step_1.*Lower lr"
    ):
        run_config(cfg, demo_model)
    folder = Path(cfg.run_dir) / "run"
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert not (folder / "final").exists()
    assert SparseAutoencoder.load_from_pretrained(folder).W_enc.isfinite().all()


def test_weights_that_are_not_finite_are_never_saved(small_config: MakeConfig, demo_model: Any) -> None:
    # The first update itself overflows.
    cfg = small_config(lr=3e38, lr_scheduler_name="constant", checkpoint_every_steps=1)
    with pytest.raises(NonFiniteLoss, match="step 1: W_enc holds values.*none was saved yet"):
        run_config(cfg, demo_model)
    assert not list((Path(cfg.run_dir) / "run").glob("checkpoints/step_*"))


def test_finished_run_of_the_same_name_is_left_alone(small_config: MakeConfig, demo_model: Any) -> None:
    first, second = (run_config(small_config(), demo_model).folder.path for _ in range(2))
    assert (first.name, second.name) == ("run", "run-2")
    assert equal_weights(first, second)


def test_runner_returns_the_autoencoder(small_config: MakeConfig, demo_model: Any) -> None:
    sae = language_model_sae_runner(small_config(), demo_model)
    assert isinstance(sae, SparseAutoencoder)
    assert not sae.training


def test_dataset_object_stands_in_for_the_path(small_config: MakeConfig, demo_model: Any) -> None:
    from datasets import Dataset

    texts = Dataset.from_dict({"text": ["The whale swam past the ship and the captain saw it. " * 30] * 40})
    run = run_config(small_config(), demo_model, texts)
    assert run.step == 12


@pytest.mark.parametrize("head", [0, 3])
def test_head_hook_logs_the_attention_kl(head: int, small_config: MakeConfig, demo_model: Any) -> None:
    d_head = demo_model.cfg.d_head
    cfg = small_config(hook_point="blocks.1.attn.hook_q", hook_point_head_index=head, d_in=d_head)
    evaluation = read_metrics(run_config(cfg, demo_model).folder.path)[-1]
    assert evaluation["metrics/kldiv_ablation"] > 0
    assert evaluation["metrics/kldiv_reconstructed"] > 0


def test_resume_must_without_an_unfinished_run_says_so(small_config: MakeConfig, demo_model: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no unfinished run 'run'"):
        run_config(small_config(resume="must"), demo_model)


def test_config_is_left_as_it_was(small_config: MakeConfig, demo_model: Any) -> None:
    cfg = small_config(d_in=None)
    before = dataclasses.replace(cfg)
    run_config(cfg, demo_model)
    assert cfg == before
