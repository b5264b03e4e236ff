"""What is found in folders of many autoencoders, by load_many and by inspect: the same, and what was not looked at."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import save_file

from sae_training.formats.folders import DEEPEST
from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder

load_many = SparseAutoencoder.load_many
SPARSIFY = reference.ROOT / "sparsify-topk"
TORCH = reference.ROOT / "dictionary_learning-autoencoder-new"


def sparsify(folder: Path) -> Path:
    source = next(path.parent for path in SPARSIFY.rglob("sae.safetensors"))
    return Path(shutil.copytree(source, folder))


def inspected(path: Path) -> set[str]:
    return {name.removesuffix(".pt") for name in inspect(path)["autoencoders"]}


def deep(path: Path, n: int) -> Path:
    return path.joinpath(*map(str, range(n)))


def test_folders_as_deep_as_the_limit_are_looked_into(tmp_path: Path) -> None:
    name = sparsify(deep(tmp_path, DEEPEST)).relative_to(tmp_path).as_posix()
    with warnings.catch_warnings(action="error"):
        assert {*load_many(tmp_path)} == {name} == inspected(tmp_path)
    assert not inspect(tmp_path)["not_read"]


def test_a_folder_too_deep_is_named_beside_what_was_found(tmp_path: Path) -> None:
    sparsify(tmp_path / "layers.1")
    too_deep = sparsify(deep(tmp_path, DEEPEST + 1)).relative_to(tmp_path).as_posix()
    with pytest.warns(UserWarning, match=rf"not looked into: {too_deep}, more than {DEEPEST} folders deep"):
        assert {*load_many(tmp_path)} == {"layers.1"}
    told = inspect(tmp_path)
    assert {*told["autoencoders"]} == {"layers.1"}
    assert f"more than {DEEPEST} folders deep" in told["not_read"][too_deep]


def test_a_folder_too_deep_is_named_where_nothing_was_found(tmp_path: Path) -> None:
    too_deep = sparsify(deep(tmp_path, DEEPEST + 2)).parent.relative_to(tmp_path).as_posix()
    for look in (load_many, inspect):
        with pytest.raises(FileNotFoundError, match=rf"not looked into: {too_deep}, more than {DEEPEST} folders deep"):
            look(tmp_path)


def test_folders_below_an_autoencoder_are_parts_of_it(tmp_path: Path) -> None:
    one = sparsify(tmp_path / "layers.1")
    deep(one, DEEPEST + 1).mkdir(parents=True)
    shutil.copy(next(TORCH.rglob("ae.pt")), deep(one, 1) / "ae.pt")
    with warnings.catch_warnings(action="error"):
        assert {*load_many(tmp_path)} == {"layers.1"} == inspected(tmp_path)
    assert not inspect(tmp_path)["not_read"]


def test_a_file_that_cannot_be_opened_is_named_beside_what_was_found(tmp_path: Path) -> None:
    sparsify(tmp_path / "layers.1")
    (tmp_path / "layers.2.pt").write_bytes(b"truncated")
    with pytest.warns(UserWarning, match=r"not read: layers\.2\.pt \(.*layers\.2\.pt: not a readable"):
        assert {*load_many(tmp_path)} == {"layers.1"}
    assert {*inspect(tmp_path)["not_read"]} == {"layers.2.pt"}
    shutil.rmtree(tmp_path / "layers.1")
    with pytest.raises(ValueError, match=r"not read: layers\.2\.pt \("):
        load_many(tmp_path)


def test_tensors_of_other_things_are_no_autoencoders(tmp_path: Path) -> None:
    """As of an optimizer beside a config, or the files of a language model."""
    sparsify(tmp_path / "layers.1")
    (tmp_path / "model").mkdir()
    save_file({"step": torch.ones(1)}, tmp_path / "model" / "optimizer.safetensors")
    (tmp_path / "model" / "cfg.json").write_text(json.dumps({"d_in": 4}))
    torch.save({"step": torch.ones(1)}, tmp_path / "model" / "optimizer.pt")
    assert {*load_many(tmp_path)} == {"layers.1"} == inspected(tmp_path)


def test_files_of_one_name_and_two_endings_are_both_there(tmp_path: Path) -> None:
    shutil.copy(next(TORCH.rglob("ae.pt")), tmp_path / "one.pt")
    shutil.copy(next(TORCH.rglob("ae.pt")), tmp_path / "one.pth")
    assert {*load_many(tmp_path)} == {"one", "one.pth"}


@pytest.mark.parametrize("place", [{"layer": 0}, {"layer": 9}, {"hook_point": "layers.9"}])
def test_one_of_unknown_place_among_others_is_at_no_place_for_either(place: dict, tmp_path: Path) -> None:
    sparsify(tmp_path / "experts")
    sparsify(tmp_path / "layers.1")
    for look in (inspect, SparseAutoencoder.load_from_pretrained):
        with pytest.raises(ValueError, match="hook_point"):
            look(tmp_path, **place)
    assert {*inspect(tmp_path, layer=1)["autoencoders"]} == {"layers.1"}
    assert "hook_point_layer" not in inspect(tmp_path)["autoencoders"]["experts"]["config"]
