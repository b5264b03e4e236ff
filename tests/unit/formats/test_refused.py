"""Files that are recognised and not read name what they are, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_training.sparse_autoencoder import SparseAutoencoder


def test_files_without_a_stated_rule(tmp_path: Path) -> None:
    names = ["encoder_linear.weight", "decoder.weight", "decoder_bias"]
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="Goodfire's top-k for gpt-oss"):
        SparseAutoencoder.load_from_pretrained(tmp_path / "weights.pt")


@pytest.mark.parametrize("kind", ["lorsa", "molt"])
def test_other_kinds_of_llamascopium(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": kind}))
    save_file({"W_E": torch.zeros(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"a {kind} of llamascopium"):
        SparseAutoencoder.load_from_pretrained(tmp_path)


def test_folders_of_models_of_sequences(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("{}")
    save_file({"encoder.weight": torch.zeros(2, 2, 2)}, tmp_path / "latest_ckpt.safetensors")
    with pytest.raises(ValueError, match="a temporal autoencoder"):
        SparseAutoencoder.load_from_pretrained(tmp_path)
