"""TODO."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.demo_data import bundled_model, bundled_text


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def with_absolute_paths(cfg: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Local models and data by absolute path, so that the run can be resumed and loaded from any working directory."""
    changes = {}
    for name in ("model_name", "dataset_path", "eval_dataset_path", "from_pretrained_path", "cached_activations_path"):
        value = getattr(cfg, name)
        if isinstance(value, list):
            changes[name] = [absolute(name, path) for path in value]
        elif value is not None:
            changes[name] = absolute(name, value)
    return dataclasses.replace(cfg, **changes)


def absolute(field: str, value: str) -> str:
    """The value by absolute path if it is a path here, else as it is."""
    return str(Path(value).expanduser().resolve()) if is_local(field, value) else value


def is_local(field: str, value: str) -> bool:
    """Whether the value is a path here. A bare word is one if it holds what the field needs, but "demo" is a name."""
    path = Path(value).expanduser()
    if os.sep in value or path.is_file():
        return path.exists()
    if value == bundled_model(value) == bundled_text(value):
        return (path / "config.json").is_file() if field == "model_name" else path.is_dir() and any(path.iterdir())
    return False
