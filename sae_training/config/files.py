"""Config files: the fields of a run config as YAML or JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from sae_training.config.checks import unknown_names, without_retired
from sae_training.config.io import FIELD_NAMES, unknown_keys
from sae_training.config.run import LanguageModelSAERunnerConfig


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number; by YAML 1.1 it is text, because it has no point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_config_values(path: str | Path) -> dict[str, Any]:
    """Return the values that a config file (.yaml, .yml or .json) gives, unchecked but for unknown fields."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: found the ending {path.suffix!r}, expected .yaml, .yml or .json; rename it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file, expected .yaml or .json; check the path")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; correct the file") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}: found a {kind}, expected lines of `field: value`; correct the file")
    if unknown := unknown_keys(values):
        raise ValueError(f"{path}: " + "\n".join(unknown_names(unknown, FIELD_NAMES, "the config")))
    return without_retired(LanguageModelSAERunnerConfig, values)
