"""Files that other programs wrote give the latent activations and outputs that those programs compute."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file

from sae_training.sparse_autoencoder import SparseAutoencoder


@pytest.mark.parametrize("folder", reference.FOLDERS, ids=lambda path: path.name)
def test_encode_and_decode_are_those_of_the_package_that_wrote_the_file(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the remarks on doubtful files, which have their own tests
        acts, out = reference.difference(folder)
    expected = load_file(folder / "expected.safetensors")
    assert acts <= 1e-5 * max(1.0, expected["acts"].abs().max().item())
    assert out <= 1e-5 * max(1.0, expected["out"].abs().max().item())


@pytest.mark.parametrize("folder", reference.FOLDERS, ids=lambda path: path.name)
def test_a_file_saved_again_in_our_own_format_is_the_same_function(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = reference.loaded(folder)
    sae.save_model(tmp_path / "again")
    again = SparseAutoencoder.load_from_pretrained(tmp_path / "again")
    x = load_file(folder / "expected.safetensors")["x"]
    assert again.cfg == sae.cfg
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.reconstruct(x), sae.reconstruct(x))


def test_reference_files_are_small_and_say_who_made_them() -> None:
    assert len(reference.FOLDERS) > 40
    for folder in reference.FOLDERS:
        facts = json.loads((folder / "expected.json").read_text())
        assert {"package", "variant", "by"} <= facts.keys()
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 60_000


def test_the_page_of_formats_has_a_row_for_each_of_them() -> None:
    page = (reference.ROOT.parents[1] / "docs" / "formats.md").read_text()
    missing = [folder.name for folder in reference.FOLDERS if f"({folder.name})" not in page]
    assert not missing, "write the table anew: scripts/reference_files/table.py"
