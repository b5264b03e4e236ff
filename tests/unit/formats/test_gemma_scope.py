"""Gemma Scope's files: which model and place their path or config names, and what is refused."""

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


def file_of(name: str) -> Path:
    folder = reference.ROOT / name
    return folder / reference.facts_of(folder)["path"]


def first(tmp_path: Path, place: str) -> Path:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    shutil.copy(file_of("gemma_scope_1-res"), folder)
    return folder


def second(tmp_path: Path, place: str, name: str = "gemma_scope_2-resid-post", **changes: Any) -> Path:
    folder = tmp_path / place
    shutil.copytree(file_of(name).parent, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("place", "model", "hook_point", "target"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "gemma-2-2b", "blocks.20.hook_resid_post", None),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_71", "gemma-2-9b-it", "blocks.9.hook_resid_post", None),
        ("gemma-scope-27b-pt-mlp/layer_2/width_1m/canonical", "gemma-2-27b", "blocks.2.hook_mlp_out", None),
        ("gemma-scope-2b-pt-att/layer_0/width_16k/x", "gemma-2-2b", "blocks.0.attn.hook_z", None),
        ("gemma-scope-2b-pt-res/embedding/width_4k/x", "gemma-2-2b", "hook_embed", None),
        (
            "models--google--gemma-scope-2b-pt-transcoders/snapshots/abc/layer_5/width_16k/x",
            "gemma-2-2b",
            "blocks.5.ln2.hook_normalized",
            "blocks.5.hook_mlp_out",
        ),
    ],
)
def test_the_path_of_the_first_names_model_and_place(
    place: str, model: str, hook_point: str, target: str | None, tmp_path: Path
) -> None:
    folder = first(tmp_path, place)
    for path in (folder, folder / "params.npz"):
        cfg = SparseAutoencoder.load_from_pretrained(path).cfg
        assert (cfg.model_name, cfg.hook_point, cfg.target_hook_point) == (model, hook_point, target)


def test_a_first_file_by_itself_is_an_autoencoder_of_an_unknown_place(tmp_path: Path) -> None:
    folder = first(tmp_path, "here")
    with pytest.warns(UserWarning, match="autoencoder or a transcoder"):
        cfg = SparseAutoencoder.load_from_pretrained(folder).cfg
    assert (cfg.model_name, cfg.hook_point, cfg.file_format) == ("unknown", "unknown", "gemma_scope 1")
    assert SparseAutoencoder.load_from_pretrained(folder, hook_point="blocks.1.hook_mlp_out").cfg.hook_point_layer == 1


def test_all_layers_of_a_repository_are_read_by_their_folders(tmp_path: Path) -> None:
    repository = tmp_path / "gemma-scope-2b-pt-res"
    for layer in (10, 9):
        first(repository, f"layer_{layer}/width_16k/average_l0_71")
    many = SparseAutoencoder.load_many(repository)
    assert list(many) == [f"layer_{layer}/width_16k/average_l0_71" for layer in (9, 10)]
    assert SparseAutoencoder.load_from_pretrained(repository, layer=10).cfg.hook_point == "blocks.10.hook_resid_post"


@pytest.mark.parametrize(
    ("hf_hook_point_in", "hook_point", "target"),
    [
        ("model.layers.7.output", "blocks.7.hook_resid_post", None),
        ("model.layers.7.post_feedforward_layernorm.output", "blocks.7.hook_mlp_out", None),
        ("model.layers.7.self_attn.o_proj.input", "blocks.7.attn.hook_z", None),
        ("model.layers.7.pre_feedforward_layernorm.output", "blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out"),
        ("model.layers.7.other", "unknown", None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*only the path says")
def test_the_config_of_the_second_names_the_place(
    hf_hook_point_in: str, hook_point: str, target: str | None, tmp_path: Path
) -> None:
    cfg = SparseAutoencoder.load_from_pretrained(second(tmp_path, "x", hf_hook_point_in=hf_hook_point_in)).cfg
    assert (cfg.hook_point, cfg.target_hook_point, cfg.model_name) == (hook_point, target, "google/gemma-3-1b-pt")


def test_without_a_config_the_folders_of_the_second_name_model_and_place(tmp_path: Path) -> None:
    folder = second(tmp_path, "gemma-scope-2-270m-pt/attn_out_all/layer_3_width_16k_l0_big")
    (folder / "config.json").unlink()
    cfg = SparseAutoencoder.load_from_pretrained(folder).cfg
    assert (cfg.model_name, cfg.hook_point) == ("google/gemma-3-270m", "blocks.3.attn.hook_z")


@pytest.mark.filterwarnings("ignore:.*only the path says")
def test_a_skip_connection_makes_a_transcoder_whatever_the_place(tmp_path: Path) -> None:
    folder = second(tmp_path, "x", "gemma_scope_2-transcoder-affine")
    (folder / "config.json").unlink()
    cfg = SparseAutoencoder.load_from_pretrained(folder).cfg
    assert (cfg.hook_point, cfg.target_hook_point, cfg.skip_connection) == ("unknown", "unknown", True)


def test_a_place_of_a_crosscoder_under_another_name_is_refused(tmp_path: Path) -> None:
    state = load_file(file_of("gemma_scope_2-resid-post"))
    state["w_dec"] = state["w_dec"].unsqueeze(1).expand(-1, 2, -1).contiguous()
    save_file(state, tmp_path / "params.safetensors")
    with pytest.raises(ValueError, match="one place of a crosscoder"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = load_file(file_of("gemma_scope_2-resid-post"))
    save_file(
        {name: t for name, t in state.items() if name != "b_dec"} | {"other": torch.zeros(1)},
        tmp_path / "params.safetensors",
    )
    with pytest.raises(ValueError, match="b_dec, other: found"):
        SparseAutoencoder.load_from_pretrained(tmp_path)
