"""OpenAI's files: which place and activation they have, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

from sae_training.sparse_autoencoder import SparseAutoencoder

SOURCE = reference.ROOT / "openai-v5" / reference.facts_of(reference.ROOT / "openai-v5")["path"]


def copy_of(tmp_path: Path, folder: str = "somewhere", **changes: Any) -> Path:
    """A copy of the v5 file in another folder, with other values in it; ... leaves a name out."""
    path = tmp_path / folder / "autoencoders" / "8.pt"
    path.parent.mkdir(parents=True)
    state = torch.load(SOURCE, weights_only=True) | changes
    torch.save({name: value for name, value in state.items() if value is not ...}, path)
    return path


@pytest.mark.parametrize(
    ("folder", "hook_point"),
    [
        ("mlp_post_act", "blocks.8.mlp.hook_post"),
        ("resid_delta_mlp_v4", "blocks.8.hook_mlp_out"),
        ("resid_delta_attn_v5_32k", "blocks.8.hook_attn_out"),
        ("resid_post_attn_v5_128k", "blocks.8.hook_resid_mid"),
        ("resid_post_mlp_v5_32k", "blocks.8.hook_resid_post"),
        ("somewhere", "unknown"),
    ],
)
def test_the_folder_names_the_place_and_the_file_the_layer(folder: str, hook_point: str, tmp_path: Path) -> None:
    cfg = SparseAutoencoder.load_from_pretrained(copy_of(tmp_path, folder)).cfg
    assert (cfg.hook_point, cfg.model_processing, cfg.file_format) == (hook_point, "none", "openai")
    assert cfg.model_name == ("unknown" if hook_point == "unknown" else "gpt2-small")


def test_topk_alone_normalises() -> None:
    topk = reference.loaded(reference.ROOT / "openai-v5").cfg
    relu = reference.loaded(reference.ROOT / "openai-v4").cfg
    assert (topk.architecture, topk.k, topk.normalize_activations) == ("topk", 4, "layer_norm_unbiased")
    assert (relu.architecture, relu.normalize_activations) == ("standard", "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Identity"}, "activation: found 'Identity', expected ReLU or TopK"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "postact_fn: found 'Identity'"),
        ({"activation_state_dict": ...}, "activation_state_dict.k is missing.*give k="),
        ({"decoder.weight": ...}, "decoder.weight is missing"),
    ],
)
def test_what_is_missing_or_not_read_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(copy_of(tmp_path, **changes))


def test_a_copy_of_the_file_alone_is_read(tmp_path: Path) -> None:
    shutil.copy(SOURCE, tmp_path / "weights.pt")
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path / "weights.pt", model_name="gpt2", hook_point="there").cfg
    assert (cfg.model_name, cfg.hook_point) == ("gpt2", "there")
