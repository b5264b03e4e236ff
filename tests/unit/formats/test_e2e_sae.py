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
