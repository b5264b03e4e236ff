"""A file of every family goes through `eval` and `build`, on the places that it names in a real model.

The model is a Llama with random weights as narrow as the reference files are, and with as many blocks as they name.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from small import VOCAB
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_analysis import cli as analysis_cli
from sae_analysis.analysis import open_analysis
from sae_training import cli
from sae_training.demo_data import DEMO_MODEL
from sae_training.formats import Given, config_at
from sae_training.run.evals import evaluate_run

D_IN, N_BLOCKS, CONTEXT_SIZE = 8, 4, 8  # the files' own width; one block more than the last of most files

GIVEN: dict[str, list[str]] = {
    "e2e_sae-many-places": ["--hook-point", "blocks.3.hook_resid_pre"],
    "qwen_scope-square": ["--k", "4"],
    "qresearch-relu": ["--hook-point", "model.layers.3"],
    "goodfire-relu-bfloat16": ["--hook-point", "blocks.3.hook_resid_post"],
    "gemma_scope_1-att-lower-case": [],
    "gemma_scope_1-transcoder": [],
    "gemma_scope_2-transcoder-affine": [],
    "attention_saes-hook-z": [],
    "openai-v5-topk-tied": [],
    "circuit_tracer-skip": [],
    "dictionary_learning-backup-gated": [],
    "sparsify-groupmax": [],
    "sparsify-skip-transcoder": [],
    "saelens-matching-pursuit": [],
    "saelens-standard-hook-z": [],
    "saelens-jumprelu-skip-transcoder": [],
    "saelens-v3-tanh-relu": [],
}
"""What the files leave out beside the text, as flags."""

NEGATIVE = {
    "saelens-abstopk": ("abstopk", 4),
    "sparsify-legacy-signed": ("abstopk", 4),
    "openai-v1-identity": ("linear", 16),
    "openai-v5-topk-identity": ("lineartopk", 14),
}
"""Their architectures, and how many latents of a row are active."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "narrow"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": D_IN, "intermediate_size": D_IN, "num_hidden_layers": N_BLOCKS}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=VOCAB, initializer_range=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(path)
    return str(path)


LATER_BLOCK = re.compile(r"(layer_?|blocks[.-]|layers\.|-l)(?:5|6|7|8|13|19|20)(?!\d)")


def at_block_3(path: Path) -> Path:
    """The file or folder with 3 in place of a later block, in its name and, if it names places, in what it holds."""
    if path.suffix == ".json":
        path.write_text(LATER_BLOCK.sub(r"\g<1>3", path.read_text()))
    if path.name.startswith("samples_"):
        torch.save({LATER_BLOCK.sub(r"\g<1>3", name): part for name, part in torch.load(path).items()}, path)
    name = "3.pt" if path.name == "8.pt" else LATER_BLOCK.sub(r"\g<1>3", path.name)
    return path.rename(path.with_name(name))


def copy_of(name: str, to: Path) -> Path:
    """A copy of a reference file, as users have it; of transcoders to a narrower place, as wide as the model's."""
    folder = to / name
    shutil.copytree(reference.ROOT / name, folder)
    for extra in ("expected.json", "expected.safetensors"):
        (folder / extra).unlink()
    config = folder / "cfg.json"
    if config.is_file() and json.loads(config.read_text()).get("d_out", D_IN) != D_IN:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"d_out": D_IN}))
        tensors = load_file(folder / "sae_weights.safetensors")
        n_more = D_IN - len(tensors["b_dec"])
        for tensor, padding in {"W_dec": (0, n_more), "b_dec": (0, n_more), "W_skip": (0, 0, 0, n_more)}.items():
            if tensor in tensors:
                tensors[tensor] = torch.nn.functional.pad(tensors[tensor], padding)
        save_file(tensors, folder / "sae_weights.safetensors")
    path = folder / reference.facts_of(reference.ROOT / name).get("path", "")
    for part in sorted(folder.rglob("*"), key=lambda found: -len(found.parts)):
        moved = at_block_3(part)
        path = moved / path.relative_to(part) if path.is_relative_to(part) else path
    return path


def flags(model: str, name: str) -> list[str]:
    return ["--model-name", model, "--dataset-path", "demo", "--context-size", str(CONTEXT_SIZE), *GIVEN.get(name, [])]


def evaluated(path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    code = cli.main(["eval", str(path), *words])
    said = capsys.readouterr()
    assert code == 0, said.err
    return dict(line.split(maxsplit=1) for line in said.out.splitlines() if line.startswith("metrics/"))


@pytest.mark.parametrize("name", GIVEN)
def test_a_dictionary_of_every_family_goes_through_eval_and_build(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings.simplefilter("ignore")  # of doubtful files, which have their own tests
    monkeypatch.chdir(tmp_path)
    path = copy_of(name, tmp_path / "files")
    figures = evaluated(path, flags(model, name), capsys)
    assert math.isfinite(float(figures["metrics/ce_loss_with_sae"]))
    assert 0 < float(figures["metrics/eval_l0"]) <= 40

    out = tmp_path / "out"
    words = ["build", str(path), *flags(model, name), "--tokens", "256", "--output", str(out)]
    code = analysis_cli.main(words)
    assert code == 0, capsys.readouterr().err
    about = open_analysis(out).about
    assert (about["model"], about["d_in"]) == (model, D_IN)
    k = 4 if "--k" in GIVEN[name] else None
    cfg = config_at(path, Given(hook_point=about["hook_point"], k=k))
    of_processed_models = ("saelens-v3", "e2e_sae", "attention_saes")
    assert cfg.model_processing == ("default" if name.startswith(of_processed_models) else "none")


@pytest.mark.parametrize("name", ["sparsify-skip-transcoder", "openai-v5-topk-tied"])
def test_more_or_less_text_is_measured_on_request(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings.simplefilter("ignore")
    path, words = copy_of(name, tmp_path), flags(model, name)
    given: dict[str, Any] = {"model_name": model, "dataset_path": "demo", "context_size": CONTEXT_SIZE}
    by_batches = {n: evaluate_run(path, n_eval_batches=n, **given) for n in (1, 2)}
    assert {n: figures["base/contexts"] for n, figures in by_batches.items()} == {1: 32, 2: 64}
    shown = evaluated(path, [*words, "--n_eval_batches", "2"], capsys)
    assert float(shown["metrics/ce_loss_with_sae"]) == pytest.approx(
        by_batches[2]["metrics/ce_loss_with_sae"], rel=1e-3
    )
    assert cli.main(["eval", str(path), *words, "--n-eval-batches", "-1"]) == 1
    assert "n_eval_batches: found -1" in capsys.readouterr().err


@pytest.mark.parametrize("name", NEGATIVE)
def test_activations_below_0_are_evaluated_and_not_analysed(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (architecture, n_active) = copy_of(name, tmp_path), NEGATIVE[name]
    figures = evaluated(path, flags(model, name), capsys)
    assert float(figures["metrics/eval_l0"]) == n_active  # whatever the signs
    assert analysis_cli.main(["build", str(path), *flags(model, name), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"found {architecture}" in error
    assert "sae-training eval" in error
