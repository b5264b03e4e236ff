"""dictionary_learning's folders: which class the tensors are of, which place is named, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder

PLACE = "resid_post_layer_3/trainer_0"


def copy_of(name: str, tmp_path: Path, buffer: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """A copy of a reference folder, with other values in its config."""
    folder = tmp_path / PLACE
    shutil.copytree(reference.ROOT / f"dictionary_learning-{name}" / PLACE, folder)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= trainer
    config["buffer"] |= buffer or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **given: Any) -> SparseAutoencoder:
    return SparseAutoencoder.load_from_pretrained(folder, **given)


@pytest.mark.parametrize(
    ("name", "architecture", "is_centred"),
    [
        ("autoencoder", "standard", True),
        ("autoencoder-new", "standard", False),
        ("gated", "gated", True),
        ("jumprelu", "jumprelu", False),
        ("topk", "topk", True),
        ("batchtopk", "batchtopk", True),
        ("matryoshka", "matryoshka", True),
    ],
)
def test_the_tensors_tell_the_class(name: str, architecture: str, is_centred: bool) -> None:
    cfg = reference.loaded(reference.ROOT / f"dictionary_learning-{name}").cfg
    assert (cfg.architecture, cfg.apply_b_dec_to_input) == (architecture, is_centred)
    assert (cfg.model_name, cfg.hook_point) == ("EleutherAI/pythia-70m-deduped", "blocks.3.hook_resid_post")
    assert (cfg.context_size, cfg.model_processing, cfg.dataset_path) == (128, "none", "unknown")


@pytest.mark.parametrize(
    ("submodule", "io", "hook_point"),
    [
        ("resid_post_layer_3", "out", "blocks.3.hook_resid_post"),
        ("resid_post_layer_3", "in", "blocks.3.hook_resid_pre"),
        ("mlp_layer_3", "out", "blocks.3.hook_mlp_out"),
        ("attention_layer_3", "out", "blocks.3.hook_attn_out"),
        ("mlp_layer_3", "in_and_out", "unknown"),
    ],
)
def test_the_place_is_that_of_the_submodule(submodule: str, io: str, hook_point: str, tmp_path: Path) -> None:
    folder = copy_of("autoencoder", tmp_path, {"io": io}, submodule_name=submodule)
    assert load(folder).cfg.hook_point == hook_point


def test_topk_and_batchtopk_are_told_apart_by_the_config_alone(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="dict_class is missing"):
        load(folder)


def test_k_of_old_files_is_in_the_config_or_is_given(tmp_path: Path) -> None:
    folder = copy_of("topk-without-k", tmp_path, k=None)
    with pytest.raises(ValueError, match=r"k is missing.*give k="):
        load(folder)
    assert load(folder, k=3).k == 3


def test_a_threshold_that_was_never_set_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="never set it"):
        reference.loaded(reference.ROOT / "dictionary_learning-batchtopk-never-set")


def test_tensors_of_no_known_class_are_named(tmp_path: Path) -> None:
    torch.save({"encoder": torch.zeros(2)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="holds encoder, the tensors of no class"):
        load(tmp_path)


def test_all_trainers_of_a_sweep_are_found(tmp_path: Path) -> None:
    source = reference.ROOT / "dictionary_learning-gated" / PLACE
    for number in (1, 12):
        shutil.copytree(source, tmp_path / "resid_post_layer_3" / f"trainer_{number}")
    many = SparseAutoencoder.load_many(tmp_path)
    assert list(many) == ["resid_post_layer_3/trainer_1", "resid_post_layer_3/trainer_12"]
    assert many["resid_post_layer_3/trainer_12"].architecture == "gated"


@pytest.mark.parametrize(
    ("name", "submodule", "is_wrong"),
    [
        ("autoencoder", "resid_post_layer_3", False),
        ("autoencoder", "mlp_layer_3", True),
        ("autoencoder-new", "mlp_layer_3", False),  # which SAELens does not load
    ],
)
def test_inspect_says_where_saelens_takes_another_place(
    name: str, submodule: str, is_wrong: bool, tmp_path: Path
) -> None:
    folder = copy_of(name, tmp_path, submodule_name=submodule)
    (one,) = inspect(folder)["autoencoders"].values()
    assert any("takes every place" in text for text in one["warnings"]) == is_wrong
