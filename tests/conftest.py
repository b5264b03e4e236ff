"""Shared parts: the bundled language model, and small configs on it. No test reaches the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402 - the variables above are read at import

from sae_training.config import LanguageModelSAERunnerConfig  # noqa: E402
from sae_training.language_model import load_language_model  # noqa: E402

# 12 steps of 64 tokens on 4 refills of a small buffer: every part of a run happens at least once.
SMALL_RUN: dict[str, Any] = {
    "model_name": "demo",
    "hook_point": "blocks.1.hook_resid_post",
    "d_in": 256,
    "lm_dtype": "float32",
    "dataset_path": "demo",
    "context_size": 16,
    "expansion_factor": 2,
    "b_dec_init_method": "mean",
    "total_training_tokens": 768,
    "train_batch_size": 64,
    "store_batch_size": 4,
    "n_batches_in_buffer": 4,
    "lr_warm_up_steps": 4,
    "n_eval_batches": 1,
    "wandb_log_frequency": 2,
    "eval_every_steps": 5,
    "feature_sampling_window": 4,
    "dead_feature_window": 3,
    "log_to_wandb": False,
    "run_name": "run",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the parts are small: more threads would only wait for each other


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """The bundled language model, in float32."""
    return load_language_model("demo", lm_dtype="float32")


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., LanguageModelSAERunnerConfig]:
    """A config of a run of about a second, in the test's own folder; keywords change fields."""

    def make(**changes: Any) -> LanguageModelSAERunnerConfig:
        return LanguageModelSAERunnerConfig(**{**SMALL_RUN, "run_dir": str(tmp_path / "runs"), **changes})

    return make
