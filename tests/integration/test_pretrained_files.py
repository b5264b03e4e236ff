"""Runs that start from the weights of another program's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import D_IN, D_SAE

from sae_training.lm_runner import run_config
from sae_training.sparse_autoencoder import SparseAutoencoder


def saelens_folder(folder: Path, **changes: Any) -> str:
    """A folder as SAELens 6 writes it, of an autoencoder of the sizes of a small run."""
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {}, **changes}
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return str(folder)


def test_a_run_starts_from_the_function_of_the_file(tmp_path: Path, small_config: Callable, demo_model: Any) -> None:
    path = saelens_folder(tmp_path / "sae")
    run = run_config(small_config(from_pretrained_path=path, lr=1e-12), demo_model)
    x = run.store.sample(100).x
    expected = SparseAutoencoder.load_from_pretrained(path).reconstruct(x)
    torch.testing.assert_close(run.sae.reconstruct(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "abstopk", "k": 4}, "its architecture is abstopk, which is not trained"),
        ({"apply_b_dec_to_input": False}, "it has apply_b_dec_to_input False, which is not trained"),
    ],
)
def test_a_file_of_what_is_not_trained_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, small_config: Callable, demo_model: Any
) -> None:
    path = saelens_folder(tmp_path / "sae", **changes)
    with pytest.raises(ValueError, match=message):
        run_config(small_config(from_pretrained_path=path), demo_model)
