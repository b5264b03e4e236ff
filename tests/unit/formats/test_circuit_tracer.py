"""circuit-tracer's folders: all layers by name, the places of their config, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from sae_training.sparse_autoencoder import SparseAutoencoder

SOURCE = reference.ROOT / "circuit_tracer-jumprelu"


def folder_with(tmp_path: Path, *layers: int) -> Path:
    shutil.copy(SOURCE / "config.yaml", tmp_path)
    for layer in layers:
        shutil.copy(SOURCE / "layer_3.safetensors", tmp_path / f"layer_{layer}.safetensors")
    return tmp_path


def test_a_folder_holds_the_transcoders_of_all_layers(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 10, 2)
    many = SparseAutoencoder.load_many(folder)
    assert list(many) == ["layer_2", "layer_10"]
    cfg = SparseAutoencoder.load_from_pretrained(folder, layer=10).cfg
    assert cfg == SparseAutoencoder.load_from_pretrained(folder / "layer_10.safetensors").cfg
    assert (cfg.hook_point, cfg.target_hook_point) == ("blocks.10.mlp.hook_in", "blocks.10.hook_mlp_out")
    assert (cfg.model_name, cfg.file_format) == ("Qwen/Qwen3-0.6B", "circuit_tracer")


def test_without_a_layer_the_caller_is_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"layer_2 .*layer_10 .*\) 2 are at .*expected one; change hook_point or layer"
    ):
        SparseAutoencoder.load_from_pretrained(folder_with(tmp_path, 10, 2))


@pytest.mark.parametrize(
    "text", ["a: &a [1]\nb: [*a, *a]", "!!python/object/apply:os.system ['true']", "- 1", "a: [", "a: &x 1"]
)
def test_a_config_that_is_not_plain_is_refused(text: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 3)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml: "):
        SparseAutoencoder.load_from_pretrained(folder)


def test_a_square_decoder_is_warned_of(tmp_path: Path) -> None:
    state = {
        name: torch.zeros(4, 4) if name.startswith("W") else torch.zeros(4)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    }
    save_file(state, tmp_path / "layer_0.safetensors")
    with pytest.warns(UserWarning, match="W_dec is square"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


def test_other_tensors_are_named_and_refused(tmp_path: Path) -> None:
    state = load_file(SOURCE / "layer_3.safetensors")
    save_file(state | {"log_thresholds": torch.zeros(4)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(ValueError, match="log_thresholds: not a tensor"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


def test_thresholds_below_0_are_refused(tmp_path: Path) -> None:
    state = load_file(SOURCE / "layer_3.safetensors")
    name = "activation_function.threshold"
    state[name][0] = -0.5
    save_file(state, tmp_path / "layer_0.safetensors")
    with pytest.raises(ValueError, match=rf"{name}: found 1 of \d+ below 0 \(the least is -0\.5\), expected 0 or more"):
        SparseAutoencoder.load_from_pretrained(tmp_path)
    state[name][0] = 0
    save_file(state, tmp_path / "layer_0.safetensors")
    assert SparseAutoencoder.load_from_pretrained(tmp_path).architecture == "jumprelu"
