from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_mps import fake_mps

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import load_language_model
from sae_training.machine.device import automatic, checked, count, is_there
from sae_training.machine.precision import bfloat16_is_fast, has_float64, in_float64
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.toy_model_runner import SAEToyModelRunnerConfig

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
        model_name="demo", dataset_path="demo", hook_point="blocks.1.hook_resid_post", d_in=192, device=name
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


def test_auto_is_cuda_or_the_processor_and_never_mps() -> None:
    with fake_mps():
        assert is_there("mps") and is_there("mps:0") and not is_there("mps:1")
        assert automatic() == ("cuda" if count("cuda") else "cpu")


def test_precisions_of_mps() -> None:
    with fake_mps():
        x = torch.tensor([0.1, 3.0], device="mps")
        wide = in_float64(x)
    assert not has_float64("mps") and has_float64("cpu") and not bfloat16_is_fast("mps")
    assert wide.device.type == "cpu" and torch.equal(wide, torch.tensor([0.1, 3.0]).double())
    assert in_float64(wide) is wide


@pytest.mark.parametrize("config", [LanguageModelSAERunnerConfig, SAEToyModelRunnerConfig])
def test_float64_on_mps_is_refused_before_anything_starts(config: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype: found float64 with device mps:0.*expected float32"):
        config(device="mps:0", dtype="float64")
    assert config(device="mps").device == "mps"
