"""OpenAI's files: the place is in the path, and what is not ReLU after all is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file

from sae_training.sparse_autoencoder import SparseAutoencoder


@pytest.mark.parametrize(
    ("name", "hook_point", "architecture"),
    [
        ("v1-relu", "blocks.8.mlp.hook_post", "standard"),
        ("v2-relu", "blocks.8.hook_mlp_out", "standard"),
        ("v3-relu-tied", "blocks.8.mlp.hook_post", "standard"),
        ("v4-relu-tied", "blocks.8.hook_mlp_out", "standard"),
        ("v5-topk", "blocks.8.hook_resid_post", "topk"),
        ("v5-topk-tied", "blocks.8.hook_resid_mid", "topk"),
        ("v1-identity", "blocks.8.hook_mlp_out", "linear"),
        ("v5-topk-identity", "blocks.8.hook_resid_post", "lineartopk"),
    ],
)
def test_the_path_names_the_place(name: str, hook_point: str, architecture: str) -> None:
    cfg = reference.loaded(reference.ROOT / f"openai-{name}").cfg
    assert (cfg.hook_point, cfg.architecture, cfg.model_name) == (hook_point, architecture, "gpt2-small")
    assert (cfg.model_processing, cfg.file_format) == ("none", "openai")


@pytest.mark.parametrize(("name", "dtype"), [("v1-relu", torch.float32), ("v1-relu-float64", torch.float64)])
def test_the_precision_is_that_of_the_file(name: str, dtype: torch.dtype) -> None:
    sae = reference.loaded(reference.ROOT / f"openai-{name}")
    assert sae.cfg.file_dtype == str(sae.cfg.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert sae.W_enc.dtype == dtype


def test_a_file_out_of_its_folder_names_no_place(tmp_path: Path) -> None:
    folder = reference.ROOT / "openai-v5-topk"
    shutil.copy(folder / reference.facts_of(folder)["path"], tmp_path / "8.pt")
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path / "8.pt").cfg
    assert (cfg.hook_point, cfg.model_name) == ("unknown", "unknown")


@pytest.mark.parametrize("name", ["v1-identity", "v5-topk-identity"])
def test_without_a_relu_activations_below_0_are_kept(name: str) -> None:
    sae = reference.loaded(reference.ROOT / f"openai-{name}")
    acts = sae.encode(load_file(reference.ROOT / f"openai-{name}" / "expected.safetensors")["x"])
    assert acts.min() < 0 < acts.max()
    n_active = sae.d_sae if name.startswith("v1") else sae.k
    assert ((acts != 0).sum(dim=1) == n_active).all()


@pytest.mark.parametrize(("activation", "postact"), [("TopK", "GELU"), ("TopK", "TopK"), ("GELU", None)])
def test_activations_whose_function_the_name_does_not_tell_are_refused(
    activation: str, postact: str | None, tmp_path: Path
) -> None:
    folder = reference.ROOT / "openai-v5-topk"
    content = torch.load(folder / reference.facts_of(folder)["path"], weights_only=True)
    content["activation"] = activation
    content["activation_state_dict"]["postact_fn"] = postact
    torch.save(content, tmp_path / "8.pt")
    with pytest.raises(ValueError, match=f"activation: found {activation} with postact_fn {postact or 'none'}"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "8.pt")


def test_a_folder_of_layers_is_read_file_by_file(tmp_path: Path) -> None:
    folder = reference.ROOT / "openai-v5-topk"
    place = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders"
    place.mkdir(parents=True)
    for layer in (2, 11):
        shutil.copy(folder / reference.facts_of(folder)["path"], place / f"{layer}.pt")
    torch.save({"step": 3}, place / "optimizer.pt")
    many = SparseAutoencoder.load_many(tmp_path)
    assert list(many) == [f"resid_post_mlp_v5_32k/autoencoders/{layer}" for layer in (2, 11)]
    assert SparseAutoencoder.load_from_pretrained(tmp_path, layer=11).cfg.hook_point == "blocks.11.hook_resid_post"


def test_other_tensors_are_named_and_refused(tmp_path: Path) -> None:
    folder = reference.ROOT / "openai-v1-relu"
    content = torch.load(folder / reference.facts_of(folder)["path"], weights_only=True)
    torch.save(content | {"scale": torch.ones(16)}, tmp_path / "8.pt")
    with pytest.raises(ValueError, match="scale: not a tensor of openai's that is read"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "8.pt")


def test_the_place_is_that_of_a_link_in_the_hub_s_cache(tmp_path: Path) -> None:
    folder = reference.ROOT / "openai-v5-topk"
    blob = tmp_path / "blobs" / "0a1b2c"
    blob.parent.mkdir()
    shutil.copy(folder / reference.facts_of(folder)["path"], blob)
    link = tmp_path / "snapshots" / "1" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    cfg = SparseAutoencoder.load_from_pretrained(link).cfg
    assert (cfg.hook_point, cfg.hook_point_layer, cfg.model_name) == ("blocks.8.hook_resid_post", 8, "gpt2-small")
