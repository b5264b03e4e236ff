"""An autoencoder's files, ours and other programs': a module for each family of formats.

A family has two functions: `recognises(path)` says whether a file or folder is one of its kind, by names alone, and
`read(path)` returns its values of config fields and its tensors, on the CPU. Nothing that a file holds is executed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_from_dict
from sae_training.formats import mats, native
from sae_training.machine.device import checked, is_there

FAMILIES = (mats, native)
"""native is the last, because it takes every folder, and says what is missing in one that holds no autoencoder."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values of config fields by name, and tensors by name. Raise ValueError or OSError if no family can read it."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint folder, a .safetensors, or an old "
            ".pt / .pkl.gz."
        )
    for family in FAMILIES:
        if family.recognises(path):
            return family.read(path)
    raise ValueError(f"{path}: unknown kind of file; expected .safetensors, .pt, .pkl or .pkl.gz.")


def load(path: Path, device: str | None = None) -> tuple[LanguageModelSAERunnerConfig, dict[str, Tensor]]:
    """Config and tensors of what `read` reads. The config's device is `device`, or the saved one if it is there."""
    values, tensors = read(path)
    cfg = config_from_dict(values, strict=False)
    if cfg.normalize_activations == "expected_average_only_in":
        raise ValueError(
            f"{path}: its config has normalize_activations {cfg.normalize_activations!r}, so its weights expect scaled "
            "activations by a factor that it does not hold; fold the factor into the weights and set it to 'none'."
        )
    if device is None:
        device = cfg.device if is_there(cfg.device) else "cpu"
    return dataclasses.replace(cfg, device=str(checked(device))), tensors
