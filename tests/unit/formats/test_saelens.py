"""SAELens' folders: what the config says, what is refused, and what a careless reader would get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import fold_decoder_norms
from sae_training.training.trainer import SAETrainer


def folder_of(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a reference folder, with another config."""
    folder = tmp_path / name
    shutil.copytree(reference.ROOT / f"saelens-{name}", folder)
    cfg = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not ...}))
    return folder


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | changes, path)


def load(folder: Path, **given: Any) -> SparseAutoencoder:
    return SparseAutoencoder.load_from_pretrained(folder, **given)


def test_the_config_says_where_an_autoencoder_comes_from() -> None:
    cfg = load(reference.ROOT / "saelens-v4-jumprelu").cfg
    assert (cfg.architecture, cfg.model_name, cfg.hook_point) == ("jumprelu", "gpt2-small", "blocks.3.hook_resid_pre")
    assert (cfg.hook_point_layer, cfg.dataset_path, cfg.context_size) == (3, "Skylion007/openwebtext", 128)
    assert (cfg.file_format, cfg.file_dtype, cfg.dtype) == ("saelens 4.0.0", "float32", torch.float32)
    assert (cfg.model_processing, cfg.device) == ("none", "cpu")  # cuda in the file, which this machine lacks


def test_version_3_had_a_processed_model_and_6_has_a_plain_one() -> None:
    assert load(reference.ROOT / "saelens-v3").cfg.model_processing == "default"
    assert load(reference.ROOT / "saelens-standard").cfg.model_processing == "none"


def test_a_model_with_centred_weights_is_the_processed_one(tmp_path: Path) -> None:
    folder = folder_of("v4", tmp_path, model_from_pretrained_kwargs={"center_writing_weights": True})
    assert load(folder).cfg.model_processing == "default"


@pytest.mark.parametrize(
    ("changes", "file_format", "processing"),
    [
        ({}, "saelens 4", "none"),
        ({"normalize_activations": ...}, "saelens 4", "none"),  # architecture came with 4
        ({"architecture": ..., "normalize_activations": ...}, "saelens 3", "default"),
        ({"architecture": ..., "normalize_activations": False}, "saelens 3", "default"),
        ({"architecture": None, "normalize_activations": None}, "saelens 3", "default"),
    ],
)
def test_without_a_version_the_fields_tell_it_once_for_format_and_processing(
    changes: dict[str, Any], file_format: str, processing: str, tmp_path: Path
) -> None:
    left_out = (
        "model_from_pretrained_kwargs",
        "dataset_trust_remote_code",
        "seqpos_slice",
        "sae_lens_training_version",
    )
    cfg = load(folder_of("v4", tmp_path, **dict.fromkeys(left_out, ...), **changes)).cfg
    assert (cfg.file_format, cfg.model_processing) == (file_format, processing)


@pytest.mark.parametrize(
    ("name", "layer", "hook_point"),
    [
        ("blocks.{layer}.hook_resid_pre", 5, "blocks.5.hook_resid_pre"),
        ("blocks.7.hook_resid_pre", 5, "blocks.7.hook_resid_pre"),
        ("my.own", 5, "my.own"),
    ],
)
def test_a_hook_without_a_layer_has_that_of_its_field(name: str, layer: int, hook_point: str, tmp_path: Path) -> None:
    changes = {"hook_name": ..., "hook_layer": ..., "hook_point": name, "hook_point_layer": layer}
    cfg = load(folder_of("v3", tmp_path, **changes)).cfg
    assert (cfg.hook_point, cfg.hook_point_layer) == (hook_point, 7 if ".7." in name else layer)


def test_a_transcoder_names_both_places() -> None:
    cfg = load(reference.ROOT / "saelens-skip-transcoder").cfg
    assert (cfg.hook_point, cfg.target_hook_point) == ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")
    assert cfg.skip_connection


def test_a_module_of_transformers_is_named_as_its_hook(tmp_path: Path) -> None:
    metadata = {"model_name": "m", "hook_name": "model.layers.12"}
    cfg = load(folder_of("standard", tmp_path, metadata=metadata)).cfg
    assert (cfg.hook_point, cfg.hook_point_layer) == ("blocks.12.hook_resid_post", 12)


def test_bfloat16_files_are_computed_in_float32_and_say_what_they_were() -> None:
    sae = load(reference.ROOT / "saelens-standard-bfloat16")
    assert (sae.W_dec.dtype, sae.cfg.file_dtype) == (torch.float32, "bfloat16")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("topk", {"k": ...}, r"k is missing.*give k="),
        ("standard", {"architecture": "temporal"}, "temporal is a model of sequences"),
        ("standard", {"architecture": "mine"}, "architecture: found 'mine'"),
        ("standard", {"architecture": ...}, "architecture is missing"),
        ("standard", {"architecture": "gated"}, "b_gate: missing"),
        ("jumprelu", {"architecture": "standard"}, "threshold: not a tensor of architecture standard"),
        ("standard", {"normalize_activations": "other"}, "normalize_activations: found 'other'"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "activation_whitening.safetensors"),
        ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input: found True"),
        ("v5-finetuned", {"finetuning_scaling_factor": False}, "finetuning_scaling_factor"),
        ("standard", {"reshape_activations": "heads"}, "reshape_activations: found 'heads', expected none or hook_z"),
        ("v4-gated", {"activation_fn_str": "tanh-relu"}, "activation_fn: found 'tanh-relu' with gated"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder_of(name, tmp_path, **changes))


def test_k_may_be_given_where_the_file_has_none(tmp_path: Path) -> None:
    sae = load(folder_of("topk", tmp_path, k=...), k=4)
    assert sae.encode(torch.randn(3, sae.d_in)).count_nonzero(dim=1).le(4).all()


def test_a_factor_of_activations_is_folded_if_it_is_given_and_warned_of_if_it_is_not() -> None:
    folder = reference.ROOT / "saelens-v3-scaled"
    with pytest.warns(UserWarning, match="give norm_factor="):
        plain = load(folder)
    scaled = load(folder, norm_factor=2.5)
    x = torch.randn(5, plain.d_in)
    torch.testing.assert_close(scaled.encode(x), plain.encode(2.5 * x))
    torch.testing.assert_close(scaled.reconstruct(x), plain.reconstruct(2.5 * x) / 2.5)


def test_a_factor_for_weights_that_need_none_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_factor: found 2.0 with normalize_activations 'none'"):
        load(reference.ROOT / "saelens-standard", norm_factor=2.0)


def test_a_pre_activation_at_the_threshold_is_inactive(tmp_path: Path) -> None:
    folder = folder_of("jumprelu", tmp_path)
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "sae_weights.safetensors").items()}
    zeros = {key: torch.zeros(shape) for key, shape in shapes.items()}
    thresholds = torch.linspace(-0.5, 3.0, shapes["threshold"][0])
    change_tensors(folder, **zeros | {"threshold": thresholds, "b_enc": thresholds.clone()})
    sae, x = load(folder), torch.zeros(1, shapes["b_dec"][0])
    assert not sae.encode(x).any()
    change_tensors(folder, b_enc=thresholds + 1e-5)
    assert torch.equal(load(folder).encode(x)[0] > 0, thresholds + 1e-5 > 0)


def test_a_row_of_zeros_in_a_rescaled_decoder_is_a_latent_that_never_fires(tmp_path: Path) -> None:
    folder = folder_of("topk-rescale", tmp_path)
    W_dec = load_file(folder / "sae_weights.safetensors")["W_dec"]
    W_dec[3] = 0
    change_tensors(folder, W_dec=W_dec)
    sae = load(folder)
    x = torch.randn(50, sae.d_in)
    assert sae.reconstruct(x).isfinite().all()
    assert not sae.encode(x)[:, 3].any()


def test_a_skip_connection_needs_the_input_to_decode() -> None:
    sae = load(reference.ROOT / "saelens-skip-transcoder")
    with pytest.raises(ValueError, match=r"decode\(acts, x\)"):
        sae.decode(torch.zeros(1, sae.d_sae))


def test_a_normalised_transcoder_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="not brought back"):
        load(reference.ROOT / "saelens-transcoder-layer-norm")


def test_rows_of_heads_and_flat_rows_are_the_same() -> None:
    sae = load(reference.ROOT / "saelens-standard-hook-z")
    x = load_file(reference.ROOT / "saelens-standard-hook-z" / "expected.safetensors")["x"]
    assert torch.equal(sae.encode(x), sae.encode(x.flatten(-2)))
    assert sae(x).sae_out.shape == x.shape
    assert torch.equal(sae(x.flatten(-2)).sae_out.view_as(x), sae(x).sae_out)


def about_place(name: str, hook_name: str | None) -> dict[str, Any]:
    cfg = json.loads((reference.ROOT / f"saelens-{name}" / "cfg.json").read_text())
    return {"metadata": cfg["metadata"] | {"hook_name": hook_name}}


@pytest.mark.parametrize("hook", ["q", "k", "v", "z", "result", "rot_q", "q_input"])
@pytest.mark.parametrize("name", ["standard-hook-z", "topk", "jumprelu-layer-norm", "gated-constant-norm-rescale"])
def test_heads_of_any_hook_that_has_them_are_put_side_by_side(name: str, hook: str, tmp_path: Path) -> None:
    place = f"blocks.3.attn.hook_{hook}"
    folder = folder_of(name, tmp_path, **about_place(name, place), reshape_activations="hook_z")
    sae, expected = load(folder), load_file(reference.ROOT / f"saelens-{name}" / "expected.safetensors")
    rows = expected["x"].reshape(-1, sae.d_in)
    heads = rows.unflatten(-1, (2, -1))
    acts = sae.encode(heads)
    torch.testing.assert_close(acts, expected["acts"].reshape(acts.shape), atol=1e-5, rtol=0)
    out = sae.decode(acts, heads)
    assert out.shape == heads.shape
    torch.testing.assert_close(out.flatten(-2), expected["out"].reshape(rows.shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "hook_name", ["blocks.3.hook_resid_post", "model.layers.3.self_attn.o_proj", "blocks.3.hook_mlp_out"]
)
def test_heads_at_a_hook_without_any_are_refused(hook_name: str, tmp_path: Path) -> None:
    folder = folder_of("standard", tmp_path, **about_place("standard", hook_name), reshape_activations="hook_z")
    with pytest.raises(ValueError, match=f"reshape_activations: found hook_z with hook_name '{hook_name}'"):
        load(folder)


def test_heads_of_a_hook_that_is_not_named_are_asked_for(tmp_path: Path) -> None:
    folder = folder_of("standard-hook-z", tmp_path, **about_place("standard-hook-z", None))
    with pytest.warns(UserWarning, match="hook_z without a hook_name: give hook_point="):
        sae = load(folder)
    x = load_file(reference.ROOT / "saelens-standard-hook-z" / "expected.safetensors")["x"]
    with pytest.raises(ValueError, match="activations: found shape"):
        sae.encode(x)
    placed = load(folder, hook_point="blocks.3.attn.hook_z")
    assert torch.equal(placed.encode(x), sae.encode(x.flatten(-2)))


@pytest.mark.parametrize("name", ["abstopk", "v3-tanh-relu"])
def test_norms_that_decide_are_not_folded(name: str) -> None:
    with pytest.raises(ValueError, match="fold_decoder_norms: architecture"):
        fold_decoder_norms(load(reference.ROOT / f"saelens-{name}"))


def test_a_place_that_the_only_one_is_not_at_is_an_error() -> None:
    folder = reference.ROOT / "saelens-gated"
    assert load(folder, layer=3).architecture == "gated"
    with pytest.raises(ValueError, match="0 are at hook_point None, layer 4, expected one"):
        load(folder, layer=4)


def test_folding_the_norms_of_a_loaded_jumprelu_keeps_its_outputs() -> None:
    sae = load(reference.ROOT / "saelens-jumprelu")
    x = torch.randn(20, sae.d_in)
    torch.testing.assert_close(fold_decoder_norms(sae).reconstruct(x), sae.reconstruct(x))


@pytest.mark.parametrize("name", ["abstopk", "matching-pursuit", "standard-not-centred", "v3-tanh-relu"])
def test_what_is_read_and_not_trained_is_refused_by_name(name: str) -> None:
    sae = load(reference.ROOT / f"saelens-{name}")
    with pytest.raises(ValueError, match="(architecture|apply_b_dec_to_input|activation_fn): found"):
        SAETrainer(sae, sae.cfg)


def test_a_folder_of_folders_is_read_one_by_one_or_by_place(tmp_path: Path) -> None:
    for name in ("saelens-gated", "sparsify-topk", "openai-v1-relu"):
        shutil.copytree(reference.ROOT / name, tmp_path / name)
    many = SparseAutoencoder.load_many(tmp_path)
    assert "saelens-gated" in many
    assert many["saelens-gated"].architecture == "gated"
    with pytest.raises(KeyError, match="nothing"):
        many["nothing"]


def test_the_one_at_a_layer_is_chosen_from_a_folder_of_folders(tmp_path: Path) -> None:
    for layer in (2, 11):
        metadata = {"model_name": "m", "hook_name": f"blocks.{layer}.hook_resid_pre"}
        folder_of("standard", tmp_path / f"layer_{layer}", metadata=metadata)
    sae = SparseAutoencoder.load_from_pretrained(tmp_path, layer=11)
    assert sae.cfg.hook_point == "blocks.11.hook_resid_pre"
    chosen = SparseAutoencoder.load_from_pretrained(tmp_path, hook_point="blocks.2.hook_resid_pre")
    assert chosen.cfg.hook_point_layer == 2
    with pytest.raises(ValueError, match="0 are at hook_point None, layer 5, expected one"):
        SparseAutoencoder.load_from_pretrained(tmp_path, layer=5)


@pytest.mark.parametrize("factor", [0, -3, "3", True])
def test_a_factor_that_is_none_is_named(factor: Any, tmp_path: Path) -> None:
    folder = folder_of("v3-scaled", tmp_path)
    with pytest.raises(ValueError, match="norm_factor: found .*expected a finite number above 0"):
        load(folder, norm_factor=factor)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(ValueError, match=r"activation_scaler.json: scaling_factor: found .*a finite number above 0"):
        load(folder)


def test_sizes_of_the_config_are_those_of_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="d_in, d_sae: found .*7.*, expected"):
        load(folder_of("standard", tmp_path, d_sae=7))
