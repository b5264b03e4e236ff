"""Our own files, written and read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import save_file

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.sparse_autoencoder import SparseAutoencoder


def small(**changes) -> SparseAutoencoder:
    return SparseAutoencoder(Config(**{"d_in": 4, "expansion_factor": 3, "k": 2, "train_batch_size": 64, **changes}))


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_save_and_load_keep_config_and_weights(name: str, tmp_path: Path) -> None:
    sae = small(architecture="topk", lr=1e-4, dtype=torch.float64)
    sae.save_model(tmp_path / "new" / name)
    again = SparseAutoencoder.load_from_pretrained(tmp_path / "new" / name)
    assert again.cfg == sae.cfg
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl.gz", "sae.pkl"])
def test_save_refuses_to_write_a_pickle(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors"):
        small().save_model(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "holds no weights"),
        (lambda path: path.write_bytes(b"x"), "unknown kind of file"),
    ],
    ids=["missing", "empty folder", "unknown ending"],
)
def test_loading_what_is_not_there_says_what_was_expected(make: Callable, message: str, tmp_path: Path) -> None:
    make(tmp_path / "thing")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        SparseAutoencoder.load_from_pretrained(tmp_path / "thing")


def test_truncated_weights_are_called_damaged(tmp_path: Path) -> None:
    small().save_model(tmp_path / "sae")
    weights = tmp_path / "sae" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or truncated"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "sae")


def test_saved_device_that_this_machine_lacks_falls_back_to_the_cpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    sae = small()
    sae.cfg = Config(d_in=4, expansion_factor=3, k=2, device="cuda")
    sae.save_model(tmp_path / "sae")
    assert SparseAutoencoder.load_from_pretrained(tmp_path / "sae").W_enc.device.type == "cpu"


def test_files_beside_each_other_keep_their_whole_names_and_may_be_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0a1b"  # as the cache of the hub has them
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number in (2, 10):
        blob = tmp_path / "models--a--b" / "blobs" / f"hash{number}"
        small(seed=number).save_model(tmp_path / "sae.safetensors")
        (tmp_path / "sae.safetensors").rename(blob)
        (snapshot / f"blocks.{number}.hook-LR-0.01.safetensors").symlink_to(blob)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "models--a--b" / "blobs" / "gone")
    save_file({"wte.weight": torch.zeros(2)}, snapshot / "other.safetensors")
    many = SparseAutoencoder.load_many(snapshot)
    assert [*many] == [f"blocks.{number}.hook-LR-0.01" for number in (2, 10)]
    assert torch.equal(many["blocks.10.hook-LR-0.01"].W_enc, small(seed=10).W_enc)


def test_a_folder_above_autoencoders_is_told_which_they_are(tmp_path: Path) -> None:
    for name in ("layers.2", "layers.10"):
        shutil.copytree(reference.ROOT / "saelens-topk", tmp_path / "repo" / name)
    with pytest.raises(
        FileNotFoundError, match=r"repo: is no autoencoder itself, but below it there are layers.2, lay"
    ):
        SparseAutoencoder.load_from_pretrained(tmp_path / "repo")
    small().save_model(tmp_path / "files" / "a-0.1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"below it there are a-0\.1\.safetensors; give the path of one"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "files")
