"""`model_processing`: with "none" an autoencoder reads the activations that transformers has, wherever it goes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small import VOCAB
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_training import cli
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.io import CACHE_FIELDS
from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import is_processed, load_language_model
from sae_training.language_model.sites import find_hook_site
from sae_training.lm_runner import run_config
from sae_training.utils import LMSparseAutoencoderSessionloader

IDS = torch.arange(1, 17).reshape(2, 8)
HOOK = "blocks.0.hook_resid_post"
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}


def make(kind: str, path: Path) -> Path:
    """Write a random model, whose residual stream has a mean."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES[kind], vocab_size=VOCAB, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("gpt2", tmp_path_factory.mktemp("gpt2"))


def hidden_states(folder: Path) -> torch.Tensor:
    """What transformers has after block 0."""
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return plain(IDS, output_hidden_states=True).hidden_states[1]


def rows(model: Any) -> torch.Tensor:
    return harvest(model, IDS, [find_hook_site(model, HOOK)])[0]


@pytest.mark.parametrize("kind", SIZES)
def test_rows_are_those_of_transformers_or_are_centred(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path)
    expected = hidden_states(folder)
    plain = load_language_model(str(folder), lm_dtype="float32", model_processing="none")
    assert is_processed(plain) is False
    torch.testing.assert_close(rows(plain), expected, atol=1e-4, rtol=1e-4)
    processed = load_language_model(str(folder), lm_dtype="float32")
    assert is_processed(processed) is True
    centred = expected if kind == "llama" else expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(rows(processed), centred, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(plain(IDS), logits, atol=1e-3, rtol=1e-3)


def config(folder: Path, run_dir: Path, **changes: Any) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        **{
            "model_name": str(folder), "hook_point": HOOK, "d_in": None, "lm_dtype": "float32", "dataset_path": "demo",
            "context_size": 16, "expansion_factor": 2, "total_training_tokens": 256, "train_batch_size": 64,
            "store_batch_size": 4, "n_batches_in_buffer": 4, "n_eval_batches": 1, "lr_warm_up_steps": 1,
            "log_to_wandb": False, "run_name": "run", "run_dir": str(run_dir), "model_processing": "none", **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_config(config(folder, tmp_path_factory.mktemp("runs"))).folder.path


def test_run_records_it_and_every_later_load_obeys(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((run / "config.json").read_text())["config"]["model_processing"] == "none"
    model, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run)
    assert sae.cfg.model_processing == "none"
    torch.testing.assert_close(store.get_activations(IDS), hidden_states(folder), atol=1e-4, rtol=1e-4)
    assert is_processed(model) is False
    recorded = json.loads((run / "final" / "evaluation.json").read_text())
    assert cli.main(["eval", str(run)]) == 0
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("metrics/"))
    name = "metrics/ce_loss_without_sae"
    assert float(found[name]) == pytest.approx(recorded[name], rel=1e-3)


def test_cache_is_identified_by_it(folder: Path, tmp_path: Path) -> None:
    assert "model_processing" in CACHE_FIELDS
    assert CacheActivationsRunnerConfig().model_processing == "default"
    words = ["cache", str(folder), "demo", f"--hook_point={HOOK}", "--context_size=16", "--store_batch_size=4"]
    words += ["--total_training_tokens=512", "--lm_dtype=float32", f"--cached_activations_path={tmp_path / 'cache'}"]
    assert cli.main([*words, "--model_processing=none"]) == 0
    options = {"cached_activations_path": str(tmp_path / "cache"), "use_cached_activations": True}
    options |= {"n_eval_batches": 10, "eval_dataset_path": None, "exclude_special_tokens": True}
    assert run_config(config(folder, tmp_path / "a", **options)).folder.final.is_dir()
    with pytest.raises(ValueError, match="model_processing"):
        run_config(config(folder, tmp_path / "b", **options, model_processing="default"))


def test_cache_of_an_earlier_version_has_the_default(folder: Path, tmp_path: Path) -> None:
    words = ["cache", str(folder), "demo", f"--hook_point={HOOK}", "--context_size=16", "--store_batch_size=4"]
    words += ["--total_training_tokens=512", "--lm_dtype=float32", f"--cached_activations_path={tmp_path / 'cache'}"]
    assert cli.main(words) == 0
    manifest = tmp_path / "cache" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["about"]["model_processing"], values["config"]["model_processing"]
    manifest.write_text(json.dumps(values))
    assert cli.main(words) == 0
    assert cli.main([*words, "--model_processing=none"]) == 1


def test_a_model_that_was_processed_otherwise_is_told(folder: Path, tmp_path: Path) -> None:
    plain = load_language_model(str(folder), lm_dtype="float32", model_processing="none")
    with pytest.warns(UserWarning, match="found 'default' with a model whose weights .* not processed"):
        run_config(config(folder, tmp_path, model_processing="default"), model=plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_config(config(folder, tmp_path / "right"), model=plain)


@pytest.mark.parametrize(("processing", "hook", "told"), [
    ("default", HOOK, True), ("none", HOOK, False), ("default", "blocks.0.mlp.hook_post", False),
])  # fmt: skip
def test_it_is_said_where_users_load(
    processing: str, hook: str, told: bool, small_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_config(small_config(model_processing=processing, hook_point=hook, d_in=None))
    said = capsys.readouterr()
    assert ("h - h.mean(-1, keepdim=True)" in said.out + said.err) is told


def test_documentation_says_it() -> None:
    for place in (LMSparseAutoencoderSessionloader.load_session_from_pretrained, load_language_model):
        assert place.__doc__ is not None
        assert "mean" in place.__doc__
