from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_training.cli import main, parse
from sae_training.config.fields import Autoencoder, Optimisation
from sae_training.config.io import with_defaults
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.toy_model_runner import SAEToyModelRunnerConfig, toy_model_sae_runner
from sae_training.toy_model_runner.picture import matched_order
from sae_training.toy_model_runner.runner import ToyModelResult, toy_model

ROOT = Path(__file__).parents[3]

# 24 features in 16 dimensions, of which 1.44 fire per row; 300 steps of 256 rows take about half a second.
SMALL: dict[str, Any] = {
    "n_features": 24,
    "n_hidden": 16,
    "d_sae": 48,
    "k": 2,
    "frequencies": "uniform",
    "feature_probability": 0.06,
    "train_batch_size": 256,
    "total_training_tokens": 256 * 300,
    "n_eval_rows": 5000,
}
SHORT = SMALL | {"total_training_tokens": 256 * 20}


def problem_lines(**values: Any) -> list[str]:
    with pytest.raises(ValueError) as caught:
        SAEToyModelRunnerConfig(**values)
    head, *lines = str(caught.value).splitlines()
    assert head == f"SAEToyModelRunnerConfig: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return lines


def file(result: ToyModelResult, name: str) -> Any:
    return json.loads((result.folder / name).read_text())


# ---------------------------------------------------------------------------------------------------------- the config


def test_defaults_are_valid_and_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = SAEToyModelRunnerConfig()
    assert cfg.dtype is torch.float32
    assert (cfg.d_in, cfg.mean_active_features, cfg.total_training_steps) == (128, 6.4, 1500)
    assert list(tmp_path.iterdir()) == []


def test_saved_config_has_the_fields_of_the_toy_run_and_its_sizes() -> None:
    cfg = SAEToyModelRunnerConfig(**SMALL, lr=0.02, seed=5, adam_beta2=0.99, lr_decay_steps=10)
    run_cfg = with_defaults(cfg)
    assert (run_cfg.d_in, run_cfg.d_sae, run_cfg.total_training_steps) == (16, 48, 300)
    assert (run_cfg.model_name, run_cfg.hook_point) == ("toy-model", "rows")
    for group in (Autoencoder, Optimisation):
        for name in group.__dataclass_fields__:
            assert getattr(run_cfg, name) == getattr(cfg, name)


def test_fields_that_are_nothing_to_a_toy_run_are_unknown() -> None:
    for name in ("dataset_path", "context_size", "grad_acc_steps", "normalize_activations", "resume", "parallel"):
        with pytest.raises(TypeError, match=f"{name}: not a field of SAEToyModelRunnerConfig"):
            SAEToyModelRunnerConfig(**{name: 1})


def test_retired_sae_gives_its_values_to_the_fields_with_one_warning() -> None:
    with pytest.warns(FutureWarning, match="sae: no longer a field of SAEToyModelRunnerConfig") as caught:
        cfg = SAEToyModelRunnerConfig(sae={"adam_beta2": 0.99, "lr_decay_steps": 10}, lr_decay_steps=20)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (cfg.adam_beta2, cfg.lr_decay_steps) == (0.99, 20)


@pytest.mark.filterwarnings("ignore:sae")
def test_retired_sae_is_checked_as_the_fields_are() -> None:
    with pytest.raises(TypeError, match="adam_beta: not a field of SAEToyModelRunnerConfig; did you mean 'adam_beta2'"):
        SAEToyModelRunnerConfig(sae={"adam_beta": 0.9})
    assert problem_lines(sae={"clip_grad_norm": -1}) == ["clip_grad_norm: found -1, expected more than 0; change it"]


def test_unknown_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="n_feature: not a field of SAEToyModelRunnerConfig; did you mean 'n_features'"):
        SAEToyModelRunnerConfig(n_feature=3)  # pyright: ignore


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"n_features": 0}, "n_features: found 0, expected more than 0; change it"),
        ({"lr": "1e-3"}, "lr: found '1e-3' (str), expected a number or auto; write 1e-3 without quotes"),
        ({"feature_probability": 1.5}, "feature_probability: found 1.5, expected more than 0 and at most 1; change it"),
        ({"correlation": -0.5}, "correlation: found -0.5, expected 0 to 1; change it"),
        ({"correlated_group_size": 1}, "correlated_group_size: found 1, expected at least 2; change it"),
        ({"n_parents": -1}, "n_parents: found -1, expected 0 or more; change it"),
        ({"noise_std": float("nan")}, "noise_std: found nan, expected a finite number; change it"),
        ({"frequencies": "zip"}, "frequencies: found 'zip', expected one of zipf, uniform; did you mean 'zipf'?"),
        ({"d_sae": 1000}, "d_sae: found 1000, expected a multiple of n_hidden = 128; 1024 is the next"),
        (
            {"n_features": 9, "n_parents": 2, "n_correlated_groups": 1, "n_anticorrelated_pairs": 1},
            "n_features: found 9, expected at least the 10 that parents with children, correlated groups and "
            "anticorrelated pairs take; raise it or lower those",
        ),
        (
            # sqrt((512 - 128) / (128 * 511)) = 0.0766
            {"max_cosine": 0.05},
            "max_cosine: found 0.05, expected more than 0.077, below which no 512 directions in 128 dimensions stay; "
            "raise it or leave it out",
        ),
        ({"k": 2000}, "k: found 2000, expected at most d_sae = 1024; lower k or raise d_sae"),
        (
            {"total_training_tokens": 5},
            "total_training_tokens: found 5, expected at least one batch of train_batch_size = 512",
        ),
        ({"k": [2, 4]}, "k: found [2, 4] (list), expected a whole number; give one value"),
        ({"clip_grad_norm": -1}, "clip_grad_norm: found -1, expected more than 0; change it"),
        ({"lr_decay_steps": 9999}, "lr_decay_steps: found 9999, expected at most the run's 1500 steps"),
        (
            {"multi_topk": True, "architecture": "standard"},
            "multi_topk: found True with architecture standard, expected topk; set one of them",
        ),
    ],
    ids=lambda part: "-".join(map(str, part)) if isinstance(part, dict) else "",
)
def test_wrong_value_is_named_with_what_to_do(values: dict[str, Any], line: str) -> None:
    (found,) = problem_lines(**values)
    assert found.startswith(line)


def test_all_problems_are_reported_at_once() -> None:
    lines = problem_lines(n_hidden=0, lr=-1, child_probability=2, adam_beta1=2, max_cosine=0)
    assert sorted(line.split(":")[0] for line in lines) == [
        *("adam_beta1", "child_probability", "lr", "max_cosine", "n_hidden"),
    ]


# ------------------------------------------------------------------------------------------------------------- the run


def test_features_stand_in_the_order_that_the_fields_say() -> None:
    cfg = SAEToyModelRunnerConfig(
        n_features=16,
        n_parents=2,
        children_per_parent=2,
        child_probability=0.25,
        n_correlated_groups=2,
        correlated_group_size=3,
        n_anticorrelated_pairs=1,
        frequencies="uniform",
        feature_probability=0.1,
        bias_norm=2.0,
    )
    model = toy_model(cfg)
    assert model.parents is not None
    assert model.parents.tolist() == [-1, -1, 0, 1, 0, 1, *[-1] * 10]
    assert [list(group) for group in model.groups] == [[6, 7, 8], [9, 10, 11]]
    assert model.exclusive_pairs == [(12, 13)]
    # 12 features of weight 1 and 4 of 1/4 share a sum of 16 * 0.1
    assert model.probabilities.tolist() == pytest.approx([1.6 / 13] * 2 + [0.4 / 13] * 4 + [1.6 / 13] * 10)
    assert model.bias is not None
    assert model.bias.norm().item() == pytest.approx(2)


def test_zipf_frequencies_have_the_mean_asked_for() -> None:
    probabilities = toy_model(SAEToyModelRunnerConfig(n_features=50, zipf_exponent=1.0)).probabilities
    assert probabilities.mean().item() == pytest.approx(0.0125)
    assert (probabilities[0] / probabilities[9]).item() == pytest.approx(10)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "topk"},
        {"architecture": "standard", "l1_coefficient": 0.02, "lr": 0.02, "total_training_tokens": 256 * 800},
    ],
    ids=["topk", "standard"],
)
def test_small_dictionary_is_recovered(changes: dict[str, Any], tmp_path: Path) -> None:
    result = toy_model_sae_runner(SAEToyModelRunnerConfig(**SMALL | changes, run_dir=str(tmp_path)))
    assert result.scores["recovered_share"] > 0.9
    assert result.scores["mean_max_cosine"] > 0.9
    assert result.scores["explained_variance"] > 0.7
    assert result.scores["true_l0"] == pytest.approx(24 * 0.06, rel=0.1)


def test_folder_holds_what_the_run_was(tmp_path: Path) -> None:
    cfg = SAEToyModelRunnerConfig(**SHORT, run_dir=str(tmp_path / "runs"), wandb_log_frequency=8, auxk_k=3)
    result = toy_model_sae_runner(cfg)
    assert result.folder == tmp_path / "runs" / "toy-topk-48-for-24-in-16"
    config = file(result, "config.json")["config"]
    assert SAEToyModelRunnerConfig(**config) == cfg
    assert file(result, "scores.json") == result.scores
    assert file(result, "status.json")["state"] == "finished"
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [8, 16, 20]
    assert rows[-1]["details/n_training_tokens"] == 20 * 256
    assert {"losses/mse_loss", "metrics/l0", "sparsity/dead_features"} <= rows[0].keys()
    page = (result.folder / "picture.html").read_text()
    assert "F1 against firing frequency" in page
    assert "<script src=" not in page  # readable offline
    loaded = SparseAutoencoder.load_from_pretrained(result.folder)
    assert torch.equal(loaded.W_dec, result.sparse_autoencoder.W_dec)
    assert loaded.auxk_k == 3


def test_runs_of_a_name_are_numbered_and_repeat_exactly(tmp_path: Path) -> None:
    cfg = SAEToyModelRunnerConfig(**SHORT, run_dir=str(tmp_path), run_name="a", noise_std=0.1)
    first, second = toy_model_sae_runner(cfg), toy_model_sae_runner(cfg)
    assert (first.folder.name, second.folder.name) == ("a", "a-2")
    assert first.scores == second.scores
    assert torch.equal(first.sparse_autoencoder.W_enc, second.sparse_autoencoder.W_enc)


def test_logging_and_evaluation_do_not_change_the_weights(tmp_path: Path) -> None:
    one = SAEToyModelRunnerConfig(**SHORT, run_dir=str(tmp_path))
    other = SAEToyModelRunnerConfig(**SHORT | {"n_eval_rows": 100}, run_dir=str(tmp_path), wandb_log_frequency=1)
    weights = [toy_model_sae_runner(cfg).sparse_autoencoder.W_dec for cfg in (one, other)]
    assert torch.equal(*weights)


def test_failed_run_says_so(tmp_path: Path) -> None:
    cfg = SAEToyModelRunnerConfig(**SHORT, run_dir=str(tmp_path), run_name="a", lr=1e30, wandb_log_frequency=1)
    with pytest.raises(ArithmeticError, match="not finite"):
        toy_model_sae_runner(cfg)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "failed"


def test_matched_order_leaves_out_features_without_a_latent() -> None:
    shown, order = matched_order(torch.tensor([4, -1, 0]))
    assert (shown.tolist(), order.tolist()) == ([0, 2], [4, 0])
    shown, order = matched_order(torch.arange(1200).flip(0))
    assert (shown[:2].tolist(), order[:2].tolist(), len(shown)) == ([0, 3], [1199, 1196], 400)


# ---------------------------------------------------------------------------------------------------- the command line


def test_command_line_trains_and_prints_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    assert main(["toy", *flags, "--run-dir", str(tmp_path), "--clip_grad_norm", "1e-1", "--ema_decay=0.9"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("Time: ")
    *table, folder = said.out.splitlines()
    assert table[0].startswith("recovered_share")
    config = json.loads((Path(folder) / "config.json").read_text())["config"]
    assert (config["clip_grad_norm"], config["ema_decay"]) == (0.1, 0.9)


def test_command_line_defaults_are_those_of_the_config() -> None:
    verb = parse(["toy"])
    cfg = SAEToyModelRunnerConfig()
    for name in SAEToyModelRunnerConfig.__dataclass_fields__:
        assert str(getattr(verb, name)) == str(getattr(cfg, name)).removeprefix("torch.")


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["--clip-grad-norm", "no"], 2, "found 'no', expected a number or None"),
        (["--d-sae", "100"], 1, "d_sae: found 100, expected a multiple of n_hidden = 128; 128 is the next"),
    ],
)
def test_wrong_words(words: list[str], code: int, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(action: Callable[[], int]) -> Any:
        try:
            return action()
        except SystemExit as stopped:
            return stopped.code

    assert run(lambda: main(["toy", *words])) == code
    assert answer in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from sae_training.cli import parse\n"
        "try: parse(['toy', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias_norm": 1000.0, "b_dec_init_method": "zeros"}, "b_dec began at zeros .*set b_dec_init_method"),
        ({"lr": 3.0}, "lr 3 is [0-9]+ times what lr auto would take|L0 is 0"),
        ({}, None),
    ],
)
def test_a_run_that_is_worse_than_the_mean_row_says_so(
    changes: dict[str, Any], expected: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = SAEToyModelRunnerConfig(**{**(SMALL if expected is None else SHORT), **changes}, run_dir=str(tmp_path))
    scores = toy_model_sae_runner(cfg).scores
    said = "".join(capsys.readouterr())
    if expected is None:
        assert scores["explained_variance"] > 0 and "Something is wrong" not in said
    else:
        assert scores["explained_variance"] < 0
        assert re.search(f"Something is wrong: .*({expected})", said), said
