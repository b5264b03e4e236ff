"""dictionary_learning's folders: which class the tensors are of, which place is named, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

from sae_training.formats.inspection import inspect
from sae_training.sparse_autoencoder import SparseAutoencoder

PLACE = "resid_post_layer_3/trainer_0"


def copy_of(name: str, tmp_path: Path, buffer: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """A copy of a reference folder, with other values in its config."""
    folder = tmp_path / PLACE
    shutil.copytree(reference.ROOT / f"dictionary_learning-{name}" / PLACE, folder)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= trainer
    config["buffer"] |= buffer or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **given: Any) -> SparseAutoencoder:
    return SparseAutoencoder.load_from_pretrained(folder, **given)


@pytest.mark.parametrize(
    ("name", "architecture", "is_centred"),
    [
        ("autoencoder", "standard", True),
        ("autoencoder-new", "standard", False),
        ("gated", "gated", True),
        ("jumprelu", "jumprelu", False),
        ("topk", "topk", True),
        ("batchtopk", "batchtopk", True),
        ("matryoshka", "matryoshka", True),
    ],
)
def test_the_tensors_tell_the_class(name: str, architecture: str, is_centred: bool) -> None:
    cfg = reference.loaded(reference.ROOT / f"dictionary_learning-{name}").cfg
    assert (cfg.architecture, cfg.apply_b_dec_to_input) == (architecture, is_centred)
    assert (cfg.model_name, cfg.hook_point) == ("EleutherAI/pythia-70m-deduped", "blocks.3.hook_resid_post")
    assert (cfg.context_size, cfg.model_processing, cfg.dataset_path) == (128, "none", "unknown")


@pytest.mark.parametrize(
    ("submodule", "io", "hook_point"),
    [
        ("resid_post_layer_3", "out", "blocks.3.hook_resid_post"),
        ("resid_post_layer_3", "in", "blocks.3.hook_resid_pre"),
        ("mlp_layer_3", "out", "blocks.3.hook_mlp_out"),
        ("attention_layer_3", "out", "blocks.3.hook_attn_out"),
        ("mlp_layer_3", "in_and_out", "unknown"),
    ],
)
def test_the_place_is_that_of_the_submodule(submodule: str, io: str, hook_point: str, tmp_path: Path) -> None:
    folder = copy_of("autoencoder", tmp_path, {"io": io}, submodule_name=submodule)
    assert load(folder).cfg.hook_point == hook_point


def test_topk_and_batchtopk_are_told_apart_by_the_config_alone(tmp_path: Path) -> None:
    folder = copy_of("topk", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="dict_class: found none.*expected AutoEncoderTopK or BatchTopKSAE"):
        load(folder)


def test_k_of_old_files_is_in_the_config_or_is_given(tmp_path: Path) -> None:
    folder = copy_of("topk-without-k", tmp_path, k=None)
    with pytest.raises(ValueError, match=r"k is missing.*give k="):
        load(folder)
    assert load(folder, k=3).k == 3


def test_a_threshold_that_was_never_set_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="never set it"):
        reference.loaded(reference.ROOT / "dictionary_learning-batchtopk-never-set")


def test_tensors_of_no_known_class_are_named(tmp_path: Path) -> None:
    torch.save({"encoder": torch.zeros(2)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="holds encoder, the tensors of no class"):
        load(tmp_path)


def test_all_trainers_of_a_sweep_are_found(tmp_path: Path) -> None:
    source = reference.ROOT / "dictionary_learning-gated" / PLACE
    for number in (1, 12):
        shutil.copytree(source, tmp_path / "resid_post_layer_3" / f"trainer_{number}")
    many = SparseAutoencoder.load_many(tmp_path)
    assert list(many) == ["resid_post_layer_3/trainer_1", "resid_post_layer_3/trainer_12"]
    assert many["resid_post_layer_3/trainer_12"].architecture == "gated"


@pytest.mark.parametrize(
    ("submodule", "hook_point"), [("mlp_layer_3", "blocks.3.mlp.hook_out"), ("attn_3", "blocks.3.attn.hook_out")]
)
def test_the_output_of_a_module_of_gemma_2_is_that_before_its_norm(
    submodule: str, hook_point: str, tmp_path: Path
) -> None:
    folder = copy_of("autoencoder", tmp_path, {"io": "out"}, submodule_name=submodule, lm_name="google/gemma-2-2b")
    assert load(folder).cfg.hook_point == hook_point


def backup_with(tmp_path: Path, name: str = "gated", **changes: Any) -> Path:
    source = reference.ROOT / f"dictionary_learning-backup-{name}"
    path = source / reference.facts_of(source)["path"]
    content = torch.load(path / "ae.pt" if path.is_dir() else path, weights_only=True) | changes
    torch.save({key: value for key, value in content.items() if value is not ...}, tmp_path / "ae.pt")
    return tmp_path / "ae.pt"


@pytest.mark.parametrize("factor", [0, 0.0, -2.5, math.nan, math.inf, "3.5", True, [3.5], torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "gated", "jumprelu"])
def test_a_factor_of_a_backup_that_is_no_number_above_0_is_refused(name: str, factor: Any, tmp_path: Path) -> None:
    path = backup_with(tmp_path, name, norm_factor=factor)
    message = r"ae\.pt: norm_factor: found .*, expected a finite number above 0"
    with pytest.raises(ValueError, match=message):
        load(path)
    (one,) = inspect(path)["autoencoders"].values()
    assert re.search(message, one["problem"])


@pytest.mark.parametrize(
    "given", [{"norm_factor": torch.tensor(3.5)}, {"norm_factor": ..., "config": {"norm_factor": 3.5}}]
)
def test_a_factor_of_a_backup_may_be_a_scalar_or_in_its_config(given: dict[str, Any], tmp_path: Path) -> None:
    plain, other = load(backup_with(tmp_path, norm_factor=3.5)), load(backup_with(tmp_path, **given))
    none = load(backup_with(tmp_path, norm_factor=None))
    assert torch.equal(plain.b_enc, other.b_enc)
    torch.testing.assert_close(plain.b_enc, 3.5 * none.b_enc)


@pytest.mark.parametrize("name", ["autoencoder", "backup-jumprelu"])
def test_a_compiled_dictionary_is_the_same(name: str, tmp_path: Path) -> None:
    source = reference.ROOT / f"dictionary_learning-{name}"
    path = source / reference.facts_of(source)["path"]
    file = path / "ae.pt" if path.is_dir() else path
    content = torch.load(file, weights_only=True)
    is_backup = "ae" in content
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in (content["ae"] if is_backup else content).items()}
    torch.save(content | {"ae": compiled} if is_backup else compiled, tmp_path / "ae.pt")
    loaded, plain = load(tmp_path / "ae.pt"), load(file)
    assert torch.equal(loaded.W_enc, plain.W_enc) and torch.equal(loaded.b_enc, plain.b_enc)


@pytest.mark.parametrize(("stated", "architecture"), [("BatchTopKSAE", "batchtopk"), ("AutoEncoderTopK", "topk")])
def test_the_config_that_the_error_shows_is_enough(stated: str, architecture: str, tmp_path: Path) -> None:
    folder = copy_of("batchtopk", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="dict_class: found none") as raised:
        load(folder)
    shown = re.findall(r"\{\"trainer\": .*?\}\}", str(raised.value))
    (folder / "config.json").write_text(next(text for text in shown if stated in text))
    assert load(folder).architecture == architecture


@pytest.mark.parametrize("text", ['{"a": NaN}', "[1]", "{"])
def test_an_unreadable_config_above_is_left_out_with_a_warning_and_one_beside_is_not(text: str, tmp_path: Path) -> None:
    folder = copy_of("autoencoder", tmp_path)
    (folder / "config.json").unlink()
    (folder.parent / "config.json").write_text(text)
    with pytest.warns(UserWarning, match="a file above is left out"):
        assert load(folder).cfg.model_name == "unknown"
    (folder.parent / "config.json").rename(folder / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: "):
        load(folder)


@pytest.mark.parametrize(
    ("name", "submodule", "is_wrong"),
    [
        ("autoencoder", "resid_post_layer_3", False),
        ("autoencoder", "mlp_layer_3", True),
        ("autoencoder-new", "mlp_layer_3", False),  # which SAELens does not load
    ],
)
def test_inspect_says_where_saelens_takes_another_place(
    name: str, submodule: str, is_wrong: bool, tmp_path: Path
) -> None:
    folder = copy_of(name, tmp_path, submodule_name=submodule)
    (one,) = inspect(folder)["autoencoders"].values()
    assert any("takes every place" in text for text in one["warnings"]) == is_wrong
