"""Runs whose activations are normalised row by row."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_training.lm_runner import resume_run, run_config
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.conversions import to_jumprelu
from sae_training.sparse_autoencoder.normalization import BY_ROW


@pytest.mark.parametrize("mode", BY_ROW)
def test_a_run_leaves_an_autoencoder_for_raw_activations(mode: str, small_config: Callable, demo_model: Any) -> None:
    run = run_config(small_config(normalize_activations=mode, architecture="topk", k=8, lr=1e-3), demo_model)
    loaded = SparseAutoencoder.load_from_pretrained(run.folder.path)
    x = run.store.sample(100).x
    assert loaded.normalization == mode
    assert torch.equal(loaded.reconstruct(x), run.sae.reconstruct(x))
    # Twice as long, the same latents, and a reconstruction twice as long.
    for sae in (loaded, to_jumprelu(loaded, x)):
        for out, expected in ((sae.encode(2 * x), sae.encode(x)), (sae.reconstruct(2 * x), 2 * sae.reconstruct(x))):
            same = torch.isclose(out, expected, rtol=1e-3, atol=1e-2).all(dim=1)
            assert same.sum() >= 95  # of 100 rows: rounding can bring a latent in or out


def test_pretrained_weights_of_another_normalisation_are_refused(small_config: Callable, demo_model: Any) -> None:
    first = run_config(small_config(normalize_activations="layer_norm"), demo_model).folder.path
    with pytest.raises(ValueError, match="from_pretrained_path: it was trained with normalize_activations layer_norm"):
        run_config(small_config(run_name="tuned", from_pretrained_path=str(first)), demo_model)
    tuned = small_config(run_name="tuned", from_pretrained_path=str(first), normalize_activations="layer_norm")
    run_config(tuned, demo_model)


def test_an_interrupted_run_goes_on(small_config: Callable, demo_model: Any) -> None:
    changes = {"normalize_activations": "layer_norm", "checkpoint_every_steps": 6}
    whole = run_config(small_config(**changes), demo_model)
    cut = run_config(small_config(**changes, run_name="cut"), demo_model)
    shutil.rmtree(cut.folder.final)
    shutil.rmtree(cut.folder.checkpoints / "step_12")
    resumed = resume_run(cut.folder.path)
    for (name, weight), (_, expected) in zip(resumed.sae.weights(), whole.sae.weights(), strict=True):
        assert torch.equal(weight, expected), name
