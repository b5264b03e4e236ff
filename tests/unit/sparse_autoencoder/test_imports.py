"""What importing an autoencoder, or the training step, brings in: torch and safetensors, for machines with no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

NOT_NEEDED = (
    "transformer_lens transformers datasets tokenizers wandb yaml plotly pandas scipy psutil filelock einops "
    "bitsandbytes"
)


@pytest.mark.parametrize("module", ["sparse_autoencoder", "training.trainer", "training.metrics"])
def test_an_import_needs_torch_and_safetensors_only(module: str) -> None:
    hide = f"sys.modules.update(dict.fromkeys({NOT_NEEDED.split()}))"  # importing any of them is then an ImportError
    command = [sys.executable, "-c", f"import sys; {hide}; import sae_training.{module}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
