from __future__ import annotations

import pytest
import torch

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model
from sae_training.machine.device import checked, count, is_there
from sae_training.sparse_autoencoder import SparseAutoencoder

KINDS = ("cuda", "mps", "xpu")
ONE_TOO_MANY = {kind: f"{kind}:{count(kind)}" for kind in KINDS}
"""A device of each kind that this machine lacks."""


def test_the_processor_is_there() -> None:
    assert is_there("cpu")
    assert checked("cpu") == torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_devices_are_there_up_to_their_number(kind: str) -> None:
    assert all(is_there(f"{kind}:{i}") for i in range(count(kind)))
    assert not is_there(ONE_TOO_MANY[kind])
    assert is_there(kind) == (count(kind) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_device_is_named_with_what_to_set(kind: str) -> None:
    name = ONE_TOO_MANY[kind]
    with pytest.raises(ValueError, match=f"device: found '{name}', but .*{kind}.*; set it to .*cpu"):
        checked(name)


def test_a_missing_device_is_refused_by_whatever_computes_on_it(demo_model: object) -> None:
    name = ONE_TOO_MANY["cuda"]
    cfg = LanguageModelSAERunnerConfig(
        model_name="demo", dataset_path="demo", hook_point="blocks.1.hook_resid_post", d_in=256, device=name
    )
    for compute in (
        lambda: load_language_model("no such model", name),
        lambda: SparseAutoencoder(cfg),
        lambda: ActivationsStore(cfg, demo_model),
    ):
        with pytest.raises(ValueError, match=f"device: found '{name}'"):
            compute()


def test_a_saved_device_that_is_missing_becomes_the_processor_but_one_asked_for_does_not(tmp_path) -> None:
    cfg = LanguageModelSAERunnerConfig(d_in=4, expansion_factor=2)
    sae = SparseAutoencoder(cfg)
    cfg.device = ONE_TOO_MANY["cuda"]
    sae.save_model(tmp_path)
    assert SparseAutoencoder.load_from_pretrained(tmp_path).device == torch.device("cpu")
    with pytest.raises(ValueError, match="device: found"):
        SparseAutoencoder.load_from_pretrained(tmp_path, device=ONE_TOO_MANY["cuda"])
