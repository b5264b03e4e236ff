"""Sessions of other programs' files: the model, the place and the text that they name, or an error that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import D_IN

from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.utils import LMSparseAutoencoderSessionloader

load = LMSparseAutoencoderSessionloader.load_session_from_pretrained


def saelens_folder(folder: Path, d_in: int = D_IN, **metadata: Any) -> Path:
    """A folder as SAELens 6 writes it, of an autoencoder for the bundled model, or one of another width."""
    d_sae = D_IN + 3
    cfg = {
        "architecture": "standard",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post", "context_size": 16, **metadata},
    }
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
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


def test_weights_of_another_width_than_the_model_ask_for_another_model(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "sae", D_IN + 1, model_name="demo", dataset_path="demo")
    expected = (
        rf"d_in: found weights for {D_IN + 1} values a position, expected {D_IN}, .*give the model that they were"
    )
    with pytest.raises(ValueError, match=expected):
        load(folder)


@pytest.mark.parametrize("missing", ["model_name", "dataset_path"])
def test_what_the_files_do_not_name_is_asked_for(missing: str, tmp_path: Path) -> None:
    facts = {name: "demo" for name in ("model_name", "dataset_path") if name != missing}
    folder = saelens_folder(tmp_path / "sae", **facts)
    with pytest.raises(ValueError, match=f"{missing}: .*give {missing}="):
        load(folder)
    _, sae, _ = load(folder, **{missing: "demo"})
    assert getattr(sae.cfg, missing) == "demo"


def test_what_nobody_knew_is_given_to_a_file_that_was_saved_again(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="whether this is an autoencoder or a transcoder"):
        sae = SparseAutoencoder.load_from_pretrained(gemma_scope_file(tmp_path))
    sae.save_model(tmp_path / "again")
    with pytest.raises(ValueError, match="model_name: .*give model_name="):
        load(tmp_path / "again")
    given = {"model_name": "demo", "dataset_path": "demo", "context_size": 16}
    _, again, store = load(tmp_path / "again", hook_point="model.layers.1", **given)
    assert again.cfg.hook_point == "blocks.1.hook_resid_post"
    assert store.get_batch_tokens().shape[1] == 16


def test_a_target_that_is_given_makes_a_transcoder_of_a_file_that_may_be_one(tmp_path: Path) -> None:
    file, places = gemma_scope_file(tmp_path), {"hook_point": "blocks.1.mlp.hook_in"}
    target = "blocks.1.hook_mlp_out"
    sae = SparseAutoencoder.load_from_pretrained(file, target_hook_point=target, **places)
    assert (sae.is_transcoder, sae.cfg.target_hook_point) == (True, target)
    assert not SparseAutoencoder.load_from_pretrained(file, **places).is_transcoder


def gemma_scope_file(folder: Path) -> Path:
    """A file of Gemma Scope 1 out of its folders, which says of no place that it is read at."""
    shapes = {"W_enc": (D_IN, D_IN), "b_enc": (D_IN,), "W_dec": (D_IN, D_IN), "b_dec": (D_IN,), "threshold": (D_IN,)}
    np.savez(folder / "params.npz", **{name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()})
    return folder / "params.npz"
