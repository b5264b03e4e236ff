"""The normaliser of activations in files of dictionary_learning's forks: used, compared, and refused in parts."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.crosscoder import Crosscoder

CROSSCODERS = reference.CROSSCODERS[0].parent
load = SparseAutoencoder.load_from_pretrained


def crosscoder(path: Path) -> Crosscoder:
    with warnings.catch_warnings(action="ignore"):
        return Crosscoder.load_from_pretrained(path)


def copy_of(name: str, tmp_path: Path) -> Path:
    name = f"dictionary_learning_fork-{name}"
    return Path(shutil.copytree(CROSSCODERS / name, tmp_path / name))


# --------------------------------------------------------------------------------------------------------- crosscoders


def test_a_decoupled_crosscoder_with_a_normaliser_is_refused(tmp_path: Path) -> None:
    path = copy_of("batchtopk-decoupled", tmp_path)
    state = load_file(path / "model.safetensors")
    zeros = torch.zeros_like(state["activation_mean"])
    save_file(state | {"activation_mean": zeros, "activation_std": zeros.clone()}, path / "model.safetensors")
    with pytest.raises(ValueError, match="normalises its input twice"):
        crosscoder(path)


@pytest.mark.parametrize("missing", ["activation_global_scale", "activation_std", "activation_mean"])
def test_a_part_of_a_normaliser_is_refused(missing: str, tmp_path: Path) -> None:
    path = copy_of("normalised", tmp_path) / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != missing}, path)
    with pytest.raises(ValueError, match=rf"activation_\w+.* without {missing}, expected all of them, or none"):
        crosscoder(path.parent)


def test_a_normaliser_of_nan_is_none_even_without_its_scale(tmp_path: Path) -> None:
    path = copy_of("crosscoder", tmp_path) / "model.safetensors"
    before = crosscoder(path.parent).b_enc
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "activation_global_scale"}, path)
    assert torch.equal(crosscoder(path.parent).b_enc, before)


@pytest.mark.parametrize("name", ["normalised", "batchtopk", "batchtopk-normalised-together", "some-places"])
def test_the_scale_of_a_normaliser_is_compared_with_its_deviations(name: str, tmp_path: Path) -> None:
    path = copy_of(f"{name}", tmp_path)
    state = load_file(path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*activation_")
        Crosscoder.load_from_pretrained(path)
    for key in ("activation_global_scale", "activation_std", "target_rms"):
        save_file(state | {key: 2 * state[key]}, path / "model.safetensors")
        with pytest.warns(UserWarning, match="activation_global_scale is .*, and target_rms and activation_std give"):
            Crosscoder.load_from_pretrained(path)
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        scale = state["activation_global_scale"].clone()
        scale.view(-1)[-1] = bad
        save_file(state | {"activation_global_scale": scale}, path / "model.safetensors")
        with pytest.raises(ValueError, match="activation_global_scale: found .*, expected finite numbers above 0"):
            crosscoder(path)


# ------------------------------------------------------------------------------------------------------- autoencoders

FORK = reference.ROOT / "dictionary_learning_fork-sae-normalised"


def fork_with(tmp_path: Path, **changes: Any) -> Path:
    shutil.copytree(FORK, tmp_path / "sae", dirs_exist_ok=True)
    state = load_file(tmp_path / "sae" / "model.safetensors") | changes
    save_file({n: t for n, t in state.items() if t is not ...}, tmp_path / "sae" / "model.safetensors")
    return tmp_path / "sae"


def test_a_dictionary_on_the_hub_is_read_as_folder_and_as_file(tmp_path: Path) -> None:
    folder = fork_with(tmp_path)
    for path in (folder, folder / "model.safetensors"):
        assert (load(path).architecture, load(path).k) == ("batchtopk", 4)
        (one,) = inspect(path)["autoencoders"].values()
        assert (one["format"], one["problem"]) == ("dictionary_learning BatchTopKSAE", None)
    assert list(SparseAutoencoder.load_many(tmp_path)) == ["sae"]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_of_a_normaliser_that_is_no_number_above_0_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activation_global_scale: found .*, expected finite numbers above 0"):
        load(fork_with(tmp_path, activation_global_scale=torch.tensor(scale)))


@pytest.mark.parametrize("name", ["activation_global_scale", "activation_std", "target_rms"])
def test_a_scale_that_the_deviations_do_not_give_is_warned_of(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*activation_")
        load(fork_with(tmp_path))
    state = load_file(FORK / "model.safetensors")
    folder = fork_with(tmp_path, **{name: 3 * state[name]})
    with pytest.warns(UserWarning, match="activation_global_scale is .*, and target_rms and activation_std give"):
        load(folder)
    (one,) = inspect(folder)["autoencoders"].values()
    assert any("target_rms and activation_std give" in text for text in one["warnings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_std": ...}, "activation_mean without activation_std"),
        ({"activation_global_scale": ...}, "without activation_global_scale"),
        ({"activation_mean": torch.zeros(3)}, r"activation_mean: found shape \(3,\), expected \(8,\)"),
        ({"threshold": ...}, "no class|no format|expected|not"),
    ],
)
def test_a_normaliser_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        load(fork_with(tmp_path, **changes))
