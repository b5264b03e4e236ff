"""Which of several autoencoders a hook_point or a layer names, and what it completes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import save_file

from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder

load = SparseAutoencoder.load_from_pretrained
D_IN, D_SAE = 4, 8


def sparsify(folder: Path, **cfg: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({"num_latents": D_SAE, "k": 2, "d_in": D_IN} | cfg))
    tensors = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, folder / "sae.safetensors")
    return folder


def transcoders(folder: Path, *layers: int) -> Path:
    """A folder of circuit-tracer without config.yaml: the names of the files tell the layers, and nothing the hooks."""
    folder.mkdir(parents=True)
    shapes = {"W_enc": (D_SAE, D_IN), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    for layer in layers:
        tensors = {name: torch.full(shape, float(layer)) for name, shape in shapes.items()}
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    return folder


@pytest.mark.parametrize("place", [{"hook_point": "layers.9"}, {"layer": 9}, {"layer": 0}])
def test_one_of_unknown_place_among_others_is_at_no_place(place: dict, tmp_path: Path) -> None:
    sparsify(tmp_path / "experts")
    sparsify(tmp_path / "layers.1")
    with pytest.raises(ValueError, match=r"experts \(unknown\), layers\.1 \(blocks\.1\.hook_resid_post\)\) 0 are at"):
        load(tmp_path, **place)
    assert load(tmp_path, layer=1).cfg.hook_point == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("model", ["google/gemma-2-2b", "OLMo-2-1124-7B", "GLM-4-9B-0414", "EXAONE-4.0"])
@pytest.mark.parametrize("asked", ["layers.3.mlp", "model.layers.3.mlp", "blocks.3.mlp.hook_out"])
@pytest.mark.parametrize("is_given", [False, True])
def test_a_module_is_found_by_its_name_in_models_with_a_norm_after_it(
    model: str, asked: str, is_given: bool, tmp_path: Path
) -> None:
    for place in ("layers.3", "layers.3.mlp", "layers.4.mlp"):
        sparsify(tmp_path / place)
    (tmp_path / "config.json").write_text(json.dumps({"model": "unnamed" if is_given else model, "dataset": "text"}))
    given = {"model_name": model} if is_given else {}
    assert load(tmp_path, hook_point=asked, **given).cfg.hook_point == "blocks.3.mlp.hook_out"
    (found,) = inspect(tmp_path, hook_point=asked, **given)["autoencoders"].values()
    assert found["config"]["hook_point"] == "blocks.3.mlp.hook_out"
    with pytest.raises(ValueError, match="0 are at"):
        load(tmp_path, hook_point="blocks.3.hook_mlp_out", **given)
    (tmp_path / "alone").mkdir()
    cfg = load(sparsify(tmp_path / "alone" / "x"), hook_point=asked, model_name=model).cfg
    assert cfg.hook_point == "blocks.3.mlp.hook_out"


def test_a_module_is_that_of_a_model_without_such_norms(tmp_path: Path) -> None:
    sparsify(tmp_path / "layers.3.mlp")
    for model in ("EleutherAI/pythia-70m", "google/gemma-2b", "google/codegemma-7b-it", "allenai/OLMo-7B-0724-hf"):
        assert load(tmp_path, hook_point="layers.3.mlp", model_name=model).cfg.hook_point == "blocks.3.hook_mlp_out"


def test_the_only_one_is_at_the_place_that_is_given(tmp_path: Path) -> None:
    sparsify(tmp_path / "experts")
    for path in (tmp_path, tmp_path / "experts"):
        cfg = load(path, hook_point="layers.5").cfg
        assert (cfg.hook_point, cfg.hook_point_layer) == ("blocks.5.hook_resid_post", 5)
        assert (load(path, layer=5).cfg.hook_point, load(path, layer=5).cfg.hook_point_layer) == ("unknown", 5)


@pytest.mark.parametrize("more", [{}, {"layer": 3}])
def test_a_layer_that_the_files_tell_is_compared_though_they_name_no_hook(more: dict, tmp_path: Path) -> None:
    folder = transcoders(tmp_path / "ct", 0, 3)
    sae = load(folder, hook_point="blocks.3.mlp.hook_in", **more)
    assert (sae.cfg.hook_point, sae.cfg.hook_point_layer) == ("blocks.3.mlp.hook_in", 3)
    assert sae.b_enc.eq(3).all()
    with pytest.raises(ValueError, match=r"layer_0 \(unknown place of layer 0\).* 0 are at"):
        load(folder, hook_point="blocks.4.mlp.hook_in")
    with pytest.raises(ValueError, match="0 are at"):
        load(transcoders(tmp_path / "alone", 3), hook_point="blocks.4.mlp.hook_in")


def test_a_file_saved_again_is_at_the_place_that_is_given(tmp_path: Path) -> None:
    load(sparsify(tmp_path / "experts")).save_model(tmp_path / "again")
    load(sparsify(tmp_path / "more")).save_model(tmp_path / "again.safetensors")
    for path in (tmp_path / "again", tmp_path / "again.safetensors"):
        cfg = load(path, hook_point="layers.5").cfg
        assert (cfg.hook_point, cfg.hook_point_layer) == ("blocks.5.hook_resid_post", 5)


def test_a_place_that_changes_the_weights_changes_them_where_it_is_given(tmp_path: Path) -> None:
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": D_SAE, "b_dec": D_IN, "threshold": D_SAE}
    (tmp_path / "below").mkdir()
    file = tmp_path / "below" / "params.npz"
    np.savez(file, **{name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()})
    for path in (file, tmp_path):
        assert load(path, hook_point="hook_embed").b_dec.eq(D_IN**0.5).all()


def test_why_the_one_at_the_place_cannot_be_read_is_said(tmp_path: Path) -> None:
    sparsify(tmp_path / "layers.1")
    sparsify(tmp_path / "layers.2", k=None)
    with pytest.raises(ValueError, match=r"layers\.2 \(cannot be read\)[^\n]*\nlayers\.2 cannot be read: .*give k="):
        load(tmp_path, hook_point="layers.2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 7}, "k: found 7, expected nothing, as these files take none; leave it out"),
        ({"norm_factor": 3.0}, "norm_factor: found 3.0, expected nothing"),
        ({"target_hook_point": "blocks.1.hook_mlp_out"}, "target_hook_point: found .* take none"),
    ],
)
@pytest.mark.parametrize("name", ["goodfire-relu-bfloat16", "dictionary_learning-autoencoder"])
def test_an_argument_that_changes_nothing_is_refused(name: str, given: dict, message: str, tmp_path: Path) -> None:
    source = reference.ROOT / name
    path = source / reference.facts_of(source)["path"]
    load(path).save_model(tmp_path / "again")
    for one in (path, tmp_path / "again"):
        with pytest.raises(ValueError, match=message):
            load(one, **given)
        with pytest.raises(ValueError, match=message):
            SparseAutoencoder.load_many(one, **given)


def test_a_k_that_is_that_of_a_file_saved_again_is_taken_and_another_refused(tmp_path: Path) -> None:
    load(sparsify(tmp_path / "layers.1", k=None), k=3).save_model(tmp_path / "again")
    assert load(tmp_path / "again", k=3).k == 3
    with pytest.raises(ValueError, match="k: found 4, expected nothing, as the files say 3"):
        load(tmp_path / "again", k=4)
