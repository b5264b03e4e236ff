"""sparsify's folders: which place and model they name, and what is refused."""

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


def copy_of(name: str, place: str, root: Path, **changes: Any) -> Path:
    """A copy of a reference autoencoder at another place, with another config."""
    source = reference.ROOT / f"sparsify-{name}"
    folder = root / place
    shutil.copytree(source / reference.facts_of(source)["path"], folder)
    shutil.copy(source / "config.json", root / "config.json")
    cfg = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    ("place", "hook_point"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("layer_10", "blocks.10.hook_resid_pre"),  # local runs of mid 2024 named the input of the block
        ("h.2", "blocks.2.hook_resid_post"),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("layers.3.attention", "blocks.3.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("layers.4/seed1", "blocks.4.hook_resid_post"),
        ("best/layers.4", "blocks.4.hook_resid_post"),
        ("something", "unknown"),
    ],
)
def test_the_folder_names_the_place_and_the_run_above_it_the_model(place: str, hook_point: str, tmp_path: Path) -> None:
    cfg = SparseAutoencoder.load_from_pretrained(copy_of("topk", place, tmp_path)).cfg
    assert cfg.hook_point == hook_point
    assert (cfg.model_name, cfg.dataset_path) == ("HuggingFaceTB/SmolLM2-135M", "EleutherAI/SmolLM2-135M-10B")
    assert (cfg.context_size, cfg.model_processing, cfg.file_format) == (2048, "none", "sparsify")


def test_a_transcoder_reads_a_module_and_writes_its_output() -> None:
    cfg = reference.loaded(reference.ROOT / "sparsify-skip-transcoder").cfg
    assert (cfg.hook_point, cfg.target_hook_point) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")


@pytest.mark.parametrize("pattern", ["layers.{}", "layer_{}"])
def test_whole_folders_are_read_by_the_names_of_their_places(pattern: str, tmp_path: Path) -> None:
    names = [pattern.format(layer) for layer in (2, 10)]
    for name in names:
        copy_of("topk", name, tmp_path)
    many = SparseAutoencoder.load_many(tmp_path)
    assert list(many) == names  # 2 before 10
    assert many[names[1]].cfg.hook_point.startswith("blocks.10.")
    assert torch.equal(SparseAutoencoder.load_from_pretrained(tmp_path, layer=10).W_enc, many[names[1]].W_enc)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": ...}, "k is missing.*give k="),
        ({"num_latents": 99}, "says 8 -> 99, but encoder.weight is 8 -> 16"),
        ({"activation": "other"}, "activation: found 'other'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(copy_of("topk", "layers.1", tmp_path, **changes))


def test_an_encoder_without_its_decoder_is_refused(tmp_path: Path) -> None:
    path = copy_of("topk", "layers.1", tmp_path) / "sae.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "W_dec"}, path)
    with pytest.raises(ValueError, match="W_dec missing"):
        SparseAutoencoder.load_from_pretrained(path.parent)


def test_groups_of_unequal_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k: found 5 with 16 latents, expected a divisor"):
        SparseAutoencoder.load_from_pretrained(copy_of("groupmax", "layers.1", tmp_path, k=5))


def test_other_tensors_are_named_and_refused(tmp_path: Path) -> None:
    folder = copy_of("topk", "layers.3", tmp_path)
    path = folder / "sae.safetensors"
    save_file(load_file(path) | {"scaling_factor": torch.ones(4)}, path)
    with pytest.raises(ValueError, match="scaling_factor: not a tensor of sparsify's that is read"):
        SparseAutoencoder.load_from_pretrained(folder)


def test_a_link_names_the_place_or_what_it_points_to_does(tmp_path: Path) -> None:
    folder = copy_of("topk", "layers.3", tmp_path)
    for name, hook_point in (("layers.9", "blocks.9.hook_resid_post"), ("mine", "blocks.3.hook_resid_post")):
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(folder)
        cfg = SparseAutoencoder.load_from_pretrained(tmp_path / "links" / name).cfg
        assert (cfg.hook_point, cfg.model_name) == (hook_point, "HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize(
    ("model", "place", "hook_point"),
    [
        ("google/gemma-2-2b", "layers.3.mlp", "blocks.3.mlp.hook_out"),
        ("google/gemma-3-1b-pt", "layers.3.self_attn", "blocks.3.attn.hook_out"),
        ("google/gemma-3-1b-pt", "layers.3", "blocks.3.hook_resid_post"),
        ("google/gemma-2b", "layers.3.mlp", "blocks.3.hook_mlp_out"),  # the first Gemma has no norm after it
    ],
)
def test_the_output_of_a_module_with_a_norm_after_it_is_that_before_the_norm(
    model: str, place: str, hook_point: str, tmp_path: Path
) -> None:
    folder = copy_of("topk", place, tmp_path)
    assert SparseAutoencoder.load_from_pretrained(folder, model_name=model).cfg.hook_point == hook_point
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": model}))
    assert SparseAutoencoder.load_from_pretrained(folder).cfg.hook_point == hook_point


@pytest.mark.parametrize("text", ['{"a": NaN}', "[1]", "{"])
def test_an_unreadable_config_above_is_left_out_with_a_warning(text: str, tmp_path: Path) -> None:
    folder = copy_of("topk", "run/layers.3", tmp_path)
    (folder.parent / "config.json").write_text(text)
    with pytest.warns(UserWarning, match="a file above is left out"):
        cfg = SparseAutoencoder.load_from_pretrained(folder).cfg
    assert (cfg.hook_point, cfg.model_name) == ("blocks.3.hook_resid_post", "HuggingFaceTB/SmolLM2-135M")
    (folder.parent / "config.json").write_text('{"model": ["a"], "dataset": 3}')
    cfg = SparseAutoencoder.load_from_pretrained(folder).cfg
    assert (cfg.model_name, cfg.dataset_path) == ("unknown", "unknown")
