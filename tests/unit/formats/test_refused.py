"""Files that are recognised and not read name what they are, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_training.sparse_autoencoder import SparseAutoencoder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["encoder_linear.weight", "decoder.weight", "decoder_bias"], "Goodfire's top-k for gpt-oss"),
        (["W_enc", "W_dec", "b_enc", "b_dec"], "a crosscoder between models"),
    ],
)
def test_files_without_a_stated_rule_and_crosscoders(names: list[str], message: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(2, 2, 2) for name in names}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(tmp_path / "weights.pt")


@pytest.mark.parametrize("kind", ["crosscoder", "clt", "lorsa", "molt"])
def test_other_kinds_of_llamascopium(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": kind}))
    save_file({"W_E": torch.zeros(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"a {kind} of llamascopium"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ("conf.yaml", "latest_ckpt.safetensors", "a temporal autoencoder"),
        ("config.json", "model.safetensors", "a crosscoder of dictionary_learning's forks"),
    ],
)
def test_folders_of_sequences_and_of_several_places(config: str, weights: str, message: str, tmp_path: Path) -> None:
    (tmp_path / config).write_text("{}")
    save_file({"encoder.weight": torch.zeros(2, 2, 2)}, tmp_path / weights)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(tmp_path)
