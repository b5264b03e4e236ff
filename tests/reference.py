"""Files that other programs wrote, with what these programs compute from them (scripts/reference_files)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.crosscoder import Crosscoder

ROOT = Path(__file__).parent / "reference_files"
FOLDERS = sorted(path.parent for path in ROOT.rglob("expected.json"))
CROSSCODERS = sorted(path.parent for path in (ROOT.parent / "reference_crosscoders").rglob("expected.json"))


class Difference(NamedTuple):
    """The largest absolute difference of latent activations, and of outputs, from the other program's."""

    acts: float
    out: float


def facts_of(folder: Path) -> dict[str, Any]:
    """`variant`, `by` (whose values they are), `package`, `path` within the folder, and what a caller must give."""
    return json.loads((folder / "expected.json").read_text())


def loaded(folder: Path) -> SparseAutoencoder | Crosscoder:
    facts = facts_of(folder)
    kind = Crosscoder if folder.name in {one.name for one in CROSSCODERS} else SparseAutoencoder
    return kind.load_from_pretrained(folder / facts.get("path", ""), **facts.get("given", {}))


@torch.no_grad()
def difference(folder: Path) -> Difference:
    sae, expected = loaded(folder), load_file(folder / "expected.safetensors")
    x = expected["x"]
    acts = sae.encode(x)
    out = sae.decode(acts, x)
    assert acts.shape == expected["acts"].shape
    assert out.shape == expected["out"].shape
    return Difference((acts - expected["acts"]).abs().max().item(), (out - expected["out"]).abs().max().item())
