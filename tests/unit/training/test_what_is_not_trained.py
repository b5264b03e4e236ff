"""Sizes that are no multiple of d_in are trained; what only files of other programs have is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.toy import SAEToyModelRunnerConfig as ToyConfig
from sae_training.config.types import ONLY_LOADED
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training.trainer import SAETrainer

SIZES: dict[str, Any] = {"d_in": 8, "n_latents": 19, "k": 3, "train_batch_size": 64, "lr_warm_up_steps": 0}


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_a_step_of_any_number_of_latents(architecture: str) -> None:
    cfg = Config(**SIZES, architecture=architecture)
    sae = SparseAutoencoder(cfg)
    trainer, x = SAETrainer(sae, cfg), torch.randn(64, 8)
    before = sae.W_dec.detach().clone()
    trainer.step(x, 0)
    assert sae.W_dec.shape == (19, 8)
    assert not torch.equal(before, sae.W_dec)


@pytest.mark.parametrize("architecture", ONLY_LOADED)
@pytest.mark.parametrize("config", [Config, ToyConfig])
def test_architectures_of_files_are_refused_by_name(architecture: str, config: Any) -> None:
    with pytest.raises(ValueError, match=f"architecture: found {architecture}, which is read from files"):
        config(architecture=architecture)


@pytest.mark.parametrize(
    ("field", "value"), [("apply_b_dec_to_input", False), ("activation_fn", "tanh-relu"), ("architecture", "abstopk")]
)
def test_a_config_that_came_from_a_file_holds_them_and_is_not_trained(field: str, value: Any) -> None:
    cfg = Config(**{**SIZES, field: value}, file_format="saelens 6")
    with pytest.raises(ValueError, match=f"{field}: found"):
        SAETrainer(SparseAutoencoder(cfg), cfg)
    with pytest.raises(ValueError, match=f"{field}: found"):
        dataclasses.replace(cfg, file_format=None)


def test_n_latents_takes_the_place_of_a_factor_and_of_no_list_of_them() -> None:
    assert Config(**SIZES, expansion_factor=2).d_sae == 19
    with pytest.raises(ValueError, match="n_latents: found 19 with expansion_factor"):
        Config(**SIZES, expansion_factor=[2, 4])
