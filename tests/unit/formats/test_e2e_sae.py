"""e2e_sae's files: many places in one, of which one is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import reference
import torch

from sae_training.sparse_autoencoder import SparseAutoencoder

FOLDER = reference.ROOT / "e2e_sae-many-places"
PLACES = ["blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre"]


def test_all_places_of_a_file_are_read_by_their_hooks() -> None:
    many = SparseAutoencoder.load_many(FOLDER / "samples_400000.pt")
    assert list(many) == PLACES
    sae = SparseAutoencoder.load_from_pretrained(FOLDER, layer=2)
    assert torch.equal(sae.W_enc, many[PLACES[0]].W_enc)
    assert (sae.cfg.hook_point, sae.cfg.hook_point_layer) == (PLACES[0], 2)
    assert sae.cfg.model_name == "gpt2-small"  # of final_config.yaml
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))


def test_without_a_place_the_caller_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="2 are at hook_point None.*expected one; change hook_point or layer"):
        SparseAutoencoder.load_from_pretrained(FOLDER / "samples_400000.pt")


def test_of_a_folder_the_file_of_the_most_samples_is_read(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "samples_400000.pt", tmp_path)
    torch.save({}, tmp_path / "samples_50000.pt")
    assert list(SparseAutoencoder.load_many(tmp_path)) == PLACES


@pytest.mark.parametrize(
    ("name", "message"), [("x.codebook", "a codebook"), ("x.decoder.bias", r"encoder\.0\.weight, .* missing")]
)
def test_codebooks_and_parts_are_named_and_refused(name: str, message: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(2, 2)}, tmp_path / "samples_1.pt")
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.load_from_pretrained(tmp_path)


TEXT = """
train_data:
  dataset_name: apollo-research/Skylion007-openwebtext-tokenizer-gpt2
  is_tokenized: true
  tokenizer_name: gpt2
  n_ctx: 512
  split: train[:50%]
"""


def test_the_model_is_processed_and_the_text_is_that_of_its_training(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "final_config.yaml"
    config.write_text(config.read_text() + TEXT)
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path, layer=2).cfg
    assert (cfg.model_name, cfg.model_processing) == ("gpt2-small", "default")
    assert cfg.dataset_path == "apollo-research/Skylion007-openwebtext-tokenizer-gpt2"
    assert (cfg.context_size, cfg.dataset_text_column, cfg.dataset_split) == (512, "input_ids", "train[:50%]")
    assert cfg.is_dataset_tokenized
    other = SparseAutoencoder.load_from_pretrained(tmp_path, layer=2, dataset_path="mine", context_size=64).cfg
    assert (other.dataset_path, other.context_size, other.is_dataset_tokenized) == ("mine", 64, None)


def test_a_model_from_a_file_is_as_it_stands(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "final_config.yaml").write_text("tlens_model_name: null\ntlens_model_path: model.pt\n")
    cfg = SparseAutoencoder.load_from_pretrained(tmp_path, layer=2).cfg
    assert (cfg.model_name, cfg.model_processing) == ("unknown", "none")


def test_a_file_without_its_config_is_warned_of(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "samples_400000.pt", tmp_path)
    with pytest.warns(UserWarning, match="model_processing is taken to be default"):
        assert SparseAutoencoder.load_from_pretrained(tmp_path, layer=2).cfg.model_processing == "default"
