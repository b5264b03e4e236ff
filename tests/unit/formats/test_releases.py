"""Facts about published autoencoders that their files do not say: which paths have them, and who says so."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
from safetensors.torch import load_file

from sae_training.config.checks import field_types
from sae_training.config.run import LanguageModelSAERunnerConfig
from sae_training.formats.inspection import inspect
from sae_training.formats.releases import facts_of, releases
from sae_training.sparse_autoencoder import SparseAutoencoder


def test_every_fact_is_of_a_field_and_has_a_source() -> None:
    known = {*field_types(LanguageModelSAERunnerConfig), "norm_factor"}
    for release in releases():
        assert release.facts and release.facts.keys() <= known, release
        assert any(word in release.source for word in ("sae-lens 6.54.12", "sparse_autoencoder@")), release
        assert release.repository is not None or release.below.endswith((r"\.pt", r"\.pth")), release


FACTOR_11 = 0.2851548652550073
QWEN = {"model_name": "Qwen/Qwen3.5-27B", "k": 100}
MISTRAL = "JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8"
GPT2 = "tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.{}.hook_mlp_out_24576:v0"


@pytest.mark.parametrize(
    ("file_format", "path", "facts"),
    [
        (
            "saelens 3",
            GPT2.format(11),
            {
                "model_processing": "default",
                "dataset_path": "Skylion007/openwebtext",
                "norm_factor": FACTOR_11,
            },
        ),
        (
            "saelens 4",
            "models--jbloom--Gemma-2b-Residual-Stream-SAEs/snapshots/a1b2/gemma_2b_blocks.12.hook_resid_post_16384",
            {"norm_factor": 0.21381938399317255},
        ),
        ("saelens 4", "jbloom/Gemma-2b-Residual-Stream-SAEs/gemma_2b_blocks.17.hook_resid_post_16384", {}),
        ("saelens 3", MISTRAL, None),
        ("saelens 3", "jbloom/GPT2-Small-SAEs-Reformatted/blocks.3.hook_resid_pre", {"model_processing": "default"}),
        (
            "qwen_scope",
            "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_100/layer3.sae.pt",
            {"model_name": "Qwen/Qwen3.5-27B", "k": 100},
        ),
        ("qwen_scope", "SAE-Res-Qwen3.5-27B-W80K-L0_100-mine/layer3.sae.pt", {}),
        ("goodfire", "Llama-3.1-8B-Instruct-SAE-l19-mine.pth", {}),
        ("mats", "Llama-3.1-8B-Instruct-SAE-l19.pth", {}),
        (
            "circuit_tracer",
            "models--mwhanna--qwen3-14b-transcoders-lowl0/snapshots/1/layer_7.safetensors",
            {
                "model_name": "Qwen/Qwen3-14B",
                "hook_point": "blocks.7.mlp.hook_in",
                "target_hook_point": "blocks.7.hook_mlp_out",
            },
        ),
        ("openai", "resid_post_mlp_v5_32k/autoencoders/8.pt", {"model_name": "gpt2-small"}),
        ("openai", "resid_post_mlp_v5_32k/8.pt", {}),
    ],
)
def test_the_path_tells_which_release_it_is(file_format: str, path: str, facts: dict[str, Any] | None) -> None:
    expected = {"normalize_activations": "constant_norm_rescale"} if facts is None else facts
    assert facts_of(Path("/cache") / path, file_format) == expected


def copied(name: str, to: Path) -> Path:
    shutil.copytree(reference.ROOT / name, to, ignore=shutil.ignore_patterns("expected.*"))
    return to


@pytest.mark.parametrize(("given", "factor"), [(None, FACTOR_11), (3.0, 3.0)])
def test_a_known_factor_is_folded_unless_another_is_given(given: float | None, factor: float, tmp_path: Path) -> None:
    name = "saelens-standard-expected-average-only-in"
    sae = SparseAutoencoder.load_from_pretrained(
        copied(name, tmp_path / GPT2.format(11)), **({} if given is None else {"norm_factor": given})
    )
    with warnings.catch_warnings(action="ignore"):
        plain = reference.loaded(reference.ROOT / name)
    x = load_file(reference.ROOT / name / "expected.safetensors")["x"]
    assert sae.cfg.model_processing == "default"
    assert (sae.encode(x) - plain.encode(factor * x)).abs().max() < 1e-4
    assert (sae.reconstruct(x) * factor - plain.reconstruct(factor * x)).abs().max() < 1e-4


def test_a_factor_is_not_used_where_the_file_is_not_of_scaled_activations(tmp_path: Path) -> None:
    sae = SparseAutoencoder.load_from_pretrained(copied("saelens-standard", tmp_path / GPT2.format(11)))
    x = load_file(reference.ROOT / "saelens-standard" / "expected.safetensors")["x"]
    assert sae.encode(x).equal(reference.loaded(reference.ROOT / "saelens-standard").encode(x))


def test_inspect_and_loading_say_the_same(tmp_path: Path) -> None:
    folder = copied("saelens-standard", tmp_path / MISTRAL)
    (told,) = inspect(folder)["autoencoders"].values()
    sae = SparseAutoencoder.load_from_pretrained(folder)
    assert told["config"]["normalize_activations"] == sae.normalization == "constant_norm_rescale"
    assert told["convention"] == "activations are in the units of normalised rows (constant_norm_rescale)"
    assert [text for text in told["warnings"] if "in place of the file's none" in text]


def test_what_is_known_replaces_no_model_that_the_files_name(tmp_path: Path) -> None:
    folder = copied("circuit_tracer-relu", tmp_path / "mwhanna" / "qwen3-4b-transcoders")
    assert SparseAutoencoder.load_from_pretrained(folder).cfg.model_name == "Qwen/Qwen3-0.6B"
    (folder / "config.yaml").unlink()
    cfg = SparseAutoencoder.load_from_pretrained(folder).cfg
    assert (cfg.model_name, cfg.target_hook_point) == ("Qwen/Qwen3-4B", "blocks.3.hook_mlp_out")
