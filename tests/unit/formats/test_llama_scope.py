"""OpenMOSS's dictionaries: which files and places they name, how rows are scaled, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_analysis.codes import code_of
from sae_training.formats.inspection import in_words, inspect
from sae_training.sparse_autoencoder import SparseAutoencoder

OF_2024 = "2024-jumprelu"


UNFOLDED = (
    "relu", "topk", "topk-norms-not-counted", "topk-transcoder", "relu-norms-not-counted",
    "jumprelu", "jumprelu-norms-not-counted", "jumprelu-transcoder",
)  # fmt: skip


def copy_of(name: str, folder: Path, config: str = "config.json", **changes: Any) -> Path:
    """A copy of a reference dictionary with another config; ... takes a key away."""
    shutil.copytree(reference.ROOT / f"llama_scope-{name}", folder, dirs_exist_ok=True)
    cfg = json.loads((folder / config).read_text()) | changes
    (folder / config).write_text(json.dumps({key: value for key, value in cfg.items() if value is not ...}))
    return folder


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(reference.ROOT / f"llama_scope-{name}" / "expected.safetensors")


@pytest.mark.parametrize(
    ("name", "file_format"),
    [(OF_2024, "llama_scope 2024"), ("2025-jumprelu", "llama_scope 2025"), ("jumprelu-folded", "llamascopium 2")],
)
def test_the_config_names_the_place(name: str, file_format: str) -> None:
    cfg = reference.loaded(reference.ROOT / f"llama_scope-{name}").cfg
    assert (cfg.hook_point, cfg.hook_point_layer) == ("blocks.15.hook_resid_post", 15)
    assert (cfg.file_format, cfg.model_processing, cfg.architecture) == (file_format, "none", "jumprelu")
    assert cfg.model_name == ("meta-llama/Llama-3.1-8B" if "2024" in name else "unknown")


def test_a_transcoder_names_both_places() -> None:
    cfg = reference.loaded(reference.ROOT / "llama_scope-topk-transcoder-folded").cfg
    assert (cfg.hook_point, cfg.target_hook_point) == ("blocks.15.ln2.hook_normalized", "blocks.15.hook_mlp_out")
    assert (cfg.k, cfg.architecture) == (4, "normtopk")


@pytest.mark.parametrize(
    ("name", "config", "release", "model"),
    [
        (OF_2024, "hyperparams.json", "Llama3_1-8B-Base-L15R-8x", "meta-llama/Llama-3.1-8B"),
        ("2025-jumprelu", "config.json", "models--fnlp--Llama-Scope-R1-Distill", "deepseek-ai/DeepSeek-R1-Distill-Lla"),
    ],
)
def test_the_path_names_the_model(name: str, config: str, release: str, model: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / release / "L15R", config)
    (folder / "lm_config.json").unlink(missing_ok=True)
    assert SparseAutoencoder.load_from_pretrained(folder).cfg.model_name.startswith(model)


def test_a_file_of_weights_takes_the_config_above_it() -> None:
    folder = reference.ROOT / f"llama_scope-{OF_2024}"
    by_file = SparseAutoencoder.load_from_pretrained(folder / "checkpoints" / "final.safetensors")
    assert by_file.cfg == reference.loaded(folder).cfg


def test_pruned_weights_come_first_as_in_their_loader(tmp_path: Path) -> None:
    folder = copy_of(OF_2024, tmp_path, "hyperparams.json")
    state = load_file(folder / "checkpoints" / "final.safetensors")
    save_file(state | {"encoder.bias": torch.full_like(state["encoder.bias"], 2.0)}, folder / "checkpoints" / "p")
    (folder / "checkpoints" / "p").rename(folder / "checkpoints" / "pruned.safetensors")
    sae = SparseAutoencoder.load_from_pretrained(folder)
    assert torch.allclose(
        sae.b_enc / sae.b_enc[0], state["decoder.weight"].norm(dim=0) / state["decoder.weight"].norm(dim=0)[0]
    )


def test_whole_folders_are_read_by_the_names_of_their_folders(tmp_path: Path) -> None:
    for layer in (2, 10):
        place = f"blocks.{layer}.hook_resid_post"
        copy_of(OF_2024, tmp_path / f"L{layer}R-8x", "hyperparams.json", hook_point_in=place, hook_point_out=place)
    many = SparseAutoencoder.load_many(tmp_path)
    assert list(many) == ["L2R-8x", "L10R-8x"]
    assert SparseAutoencoder.load_from_pretrained(tmp_path, layer=10).cfg.hook_point == "blocks.10.hook_resid_post"


def test_normtopk_chooses_by_norms_and_reports_activations_without_them() -> None:
    sae = reference.loaded(reference.ROOT / "llama_scope-topk-folded-after-its-config")
    x = expected("topk-folded-after-its-config")["x"]
    pre = sae.pre_activations(sae.sae_input(x))
    by_norms, by_pre = (pre * sae.W_dec.norm(dim=1)).topk(sae.k).indices, pre.topk(sae.k).indices
    acts = sae.encode(x)
    assert torch.equal(acts, torch.zeros_like(pre).scatter(1, by_norms, pre.gather(1, by_norms).relu()))
    assert not torch.equal(by_norms.sort().values, by_pre.sort().values)
    code = code_of(sae, x)
    assert torch.equal(code.values, acts[acts > 0])
    torch.testing.assert_close(sae(x).sae_out, sae.reconstruct(x))


# ------------------------------------------------------------------------------------------------------------- scaling


def test_a_norm_that_was_folded_after_the_config_was_written_is_warned_of(tmp_path: Path) -> None:
    name = "topk-folded-after-its-config"
    with pytest.warns(UserWarning, match="give norm_factor=1"):
        wrong = SparseAutoencoder.load_from_pretrained(copy_of(name, tmp_path)).reconstruct(expected(name)["x"])
    assert (wrong - expected(name)["out"]).abs().max() > 0.5  # what llamascopium itself makes of its own file


@pytest.mark.parametrize("norm", [None, 0.0, float("nan"), 1e-41, -3.0])
def test_without_a_plausible_norm_the_factor_is_asked_for(norm: float | None, tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    state = load_file(folder / "sae_weights.safetensors")
    key = "dataset_average_activation_norm.blocks.15.hook_resid_post"
    state[key] = torch.tensor(norm or 0.0)
    if norm is None:
        del state[key]
    save_file(state, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"dataset_average_activation_norm is .*give norm_factor="):
        SparseAutoencoder.load_from_pretrained(folder)
    sae = SparseAutoencoder.load_from_pretrained(folder, norm_factor=sae_factor(state))
    assert torch.allclose(sae.encode(expected("topk")["x"]), expected("topk")["acts"], atol=1e-5)


def sae_factor(state: dict[str, torch.Tensor]) -> float:
    return len(state["W_E"]) ** 0.5 / 4.0


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("topk-transcoder", 2.0, "inputs and targets of a transcoder have one each"),
        ("jumprelu-folded", 2.0, "norm_factor: given, with norm_activation inference"),
    ],
)
def test_a_factor_that_does_not_fit_is_refused(name: str, factor: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(reference.ROOT / f"llama_scope-{name}", norm_factor=factor)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "batchtopk"}, "act_fn is batchtopk, whose active latents depend on the other rows"),
        ({"act_fn": "layertopk"}, "act_fn: found 'layertopk', expected relu"),
        ({"norm_activation": "batch-wise"}, "norm_activation is batch-wise"),
        ({"norm_activation": "other"}, "norm_activation: found 'other', expected dataset-wise"),
        ({"use_glu_encoder": True}, "its encoder is gated"),
        ({"act_fn": "jumprelu"}, "expected .*activation_function.log_jumprelu_threshold"),
        ({"use_decoder_bias": False}, "found .*b_D.*, expected W_D, W_E, b_E,"),
        ({"sae_type": "mixcoder"}, "sae_type: found 'mixcoder', expected sae"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(copy_of("topk", tmp_path, **changes))


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    state = load_file(folder / "sae_weights.safetensors")
    for name, changed in (
        ("W_D", state["W_D"][1:].clone()),
        ("b_E", state["b_E"][1:].clone()),
        ("W_E", state["b_E"].clone()),
    ):
        save_file(state | {name: changed}, folder / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=r"sae_weights\.safetensors|expected two axes"):
            SparseAutoencoder.load_from_pretrained(folder)


def test_shards_are_named_and_refused(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    (folder / "sae_weights.safetensors").unlink()
    (folder / "sae_weights.dcp").mkdir()
    with pytest.raises(ValueError, match="a checkpoint in shards"):
        SparseAutoencoder.load_from_pretrained(folder)


KEYS = {
    "sae_type", "hook_point_in", "hook_point_out", "use_decoder_bias", "use_glu_encoder", "act_fn", "norm_activation",
    "jump_relu_threshold", "apply_decoder_bias_to_pre_encoder", "dataset_average_activation_norm", "top_k",
    "sparsity_include_decoder_norm",
}  # fmt: skip
ODD_VALUES = [None, -1, 10**30, 1.5, "x", [1], {"in": "x", "out": []}, {"in": 0, "out": -1}]


@pytest.mark.parametrize(
    ("name", "config"), [(OF_2024, "hyperparams.json"), ("2025-jumprelu", "config.json"), ("topk", "config.json")]
)
def test_values_of_other_types_load_or_are_refused(
    name: str, config: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = copy_of(name, tmp_path / "sae", config)
    cfg = json.loads((folder / config).read_text())
    for key in cfg.keys() & KEYS:
        for value in ODD_VALUES:
            (folder / config).write_text(json.dumps(cfg | {key: value}))
            try:
                SparseAutoencoder.load_from_pretrained(folder)
            except (ValueError, OSError) as error:
                assert str(folder) in str(error)


# ------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (OF_2024, "in other units than SAELens'"),
        ("2025-jumprelu", "which SAELens' loader leaves out"),
        ("jumprelu-folded", "not into the thresholds"),
        ("jumprelu-transcoder-folded", "not into the thresholds"),
        ("jumprelu-norms-not-counted", "which scales pre-activations and not the thresholds"),
        ("topk-token-wise", "chosen by pre-activations times the norms"),
        ("2024-topk-with-threshold", "goes on to choose the k largest"),
        ("jumprelu", "give norm_factor=1"),
    ],
)
def test_known_traps_are_told(name: str, words: str) -> None:
    told = inspect(reference.ROOT / f"llama_scope-{name}")["autoencoders"]["."]
    assert told["problem"] is None
    assert any(words in text for text in told["warnings"])


def test_a_norm_that_the_caller_says_is_folded_has_the_trap_of_a_folded_one() -> None:
    name, words = "llama_scope-jumprelu-folded-after-its-config", "not into the thresholds"
    told = inspect(reference.ROOT / name, norm_factor=1.0)["autoencoders"]["."]
    assert any(words in text for text in told["warnings"])
    plain = inspect(reference.ROOT / name)["autoencoders"]["."]
    assert not any(words in text for text in plain["warnings"])
    assert any("give norm_factor=1" in text for text in plain["warnings"])


@pytest.mark.parametrize("name", [name for name in UNFOLDED if "jumprelu" not in name])
def test_folding_is_the_same_function_without_thresholds(name: str, tmp_path: Path) -> None:
    check_folded(name, tmp_path, is_same=True)


@pytest.mark.parametrize("name", [name for name in UNFOLDED if "jumprelu" in name])
def test_folding_as_llamascopium_does_is_another_function_with_thresholds(name: str, tmp_path: Path) -> None:
    check_folded(name, tmp_path, is_same=False)


def check_folded(name: str, tmp_path: Path, is_same: bool) -> None:
    """Fold the norms as `standardize_parameters_of_dataset_norm` does: b_E, b_D and W_D, and no thresholds."""
    folder = copy_of(name, tmp_path, norm_activation="inference")
    state, config = load_file(folder / "sae_weights.safetensors"), json.loads((folder / "config.json").read_text())
    sides = [f"dataset_average_activation_norm.{config[key]}" for key in ("hook_point_in", "hook_point_out")]
    s_in, s_out = (len(state["W_E"]) ** 0.5 / float(state[side]) for side in sides)
    state["b_E"], state["b_D"] = state["b_E"] / s_in, state["b_D"] / s_out
    state["W_D"] = state["W_D"] * (s_in / s_out)
    save_file(state, folder / "sae_weights.safetensors")
    folded, x = SparseAutoencoder.load_from_pretrained(folder), expected(name)["x"]
    active = (folded.encode(x) > 0) == (expected(name)["acts"] > 0)
    assert bool(active.all()) == is_same
    assert torch.allclose(folded.reconstruct(x), expected(name)["out"], atol=1e-5) == is_same


@pytest.mark.parametrize("name", [OF_2024, "2024-jumprelu-pickle", "jumprelu-pickle", "topk"])
def test_figures_are_of_the_file_that_is_read(name: str) -> None:
    told = inspect(reference.ROOT / f"llama_scope-{name}", full=True)
    (one,) = told["autoencoders"].values()
    files = [file for file in one["figures"] if file != "expected.safetensors"]
    assert len(files) == 1
    decoders = [part for part in one["figures"][files[0]].values() if "decoder_norms" in part]
    assert len(decoders) == 1 and decoders[0]["decoder_norms"]["least"] > 0
    assert "norms of decoder rows" in in_words(told)
