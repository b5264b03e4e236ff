"""Sessions of other programs' files: the model, the place and the text that they name, or an error that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import D_IN

from sae_training.utils import LMSparseAutoencoderSessionloader

load = LMSparseAutoencoderSessionloader.load_session_from_pretrained


def saelens_folder(folder: Path, **metadata: Any) -> Path:
    """A folder as SAELens 6 writes it, of an autoencoder for the bundled model."""
    d_sae = D_IN + 3
    cfg = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": d_sae,
        "dtype": "float32",
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post", "context_size": 16, **metadata},
    }
    shapes = {"W_enc": (D_IN, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, D_IN), "b_dec": (D_IN,)}
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "sae_weights.safetensors")
    return folder


def test_a_session_comes_up_from_what_the_files_name(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "sae", model_name="demo", dataset_path="demo")
    model, sae, store = load(folder)
    assert (sae.d_sae, sae.cfg.model_processing) == (D_IN + 3, "none")
    rows = store.get_activations(store.get_batch_tokens())
    assert sae.encode(rows).shape == (*rows.shape[:2], D_IN + 3)
    assert model.cfg.d_model == D_IN


@pytest.mark.parametrize("missing", ["model_name", "dataset_path"])
def test_what_the_files_do_not_name_is_asked_for(missing: str, tmp_path: Path) -> None:
    facts = {name: "demo" for name in ("model_name", "dataset_path") if name != missing}
    folder = saelens_folder(tmp_path / "sae", **facts)
    with pytest.raises(ValueError, match=f"{missing}: .*give {missing}="):
        load(folder)
    _, sae, _ = load(folder, **{missing: "demo"})
    assert getattr(sae.cfg, missing) == "demo"
