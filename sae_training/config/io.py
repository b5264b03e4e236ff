"""Configs as JSON and YAML, and what is asked of stored ones: what is unknown, what differs."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from sae_training.config.checks import nearest, plain_values, unknown_names
from sae_training.config.run import LanguageModelSAERunnerConfig

FIELD_NAMES = tuple(field.name for field in fields(LanguageModelSAERunnerConfig))

# Fields that only watch or place a run. Two configs that differ in nothing else train the same
# weights. n_eval_batches is not among them: it decides which contexts are held out from training.
WATCHING_FIELDS = frozenset(
    (
        "log_to_wandb",
        "wandb_project",
        "wandb_entity",
        "wandb_mode",
        "wandb_log_frequency",
        "eval_every_steps",
        "run_name",
        "run_dir",
        "checkpoint_path",
        "resume",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "n_checkpoints",
        "device",
        "tokenizer_processes",
    )
)


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number; by YAML 1.1 it is text, because it has no point."""


class _YamlDumper(yaml.SafeDumper):
    """SafeDumper that puts quotes round a text that `_YamlLoader` would read as a number."""


for _yaml in (_YamlLoader, _YamlDumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def config_to_dict(cfg: Any) -> dict[str, Any]:
    """The fields of a config (of this or the toy runner) in JSON types: dtype as "float32", tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain_values(cfg).items()}


def config_from_dict(values: Mapping[str, Any], strict: bool = True) -> LanguageModelSAERunnerConfig:
    """The config that the values describe; fields that are not given take their defaults.

    Unknown keys raise ValueError, all at once. With strict=False they are dropped (`unknown_keys`
    lists them): for files that other programs wrote.
    """
    unknown = unknown_keys(values)
    if unknown and strict:
        raise ValueError("\n".join(unknown_names(unknown, FIELD_NAMES, "the config")))
    return LanguageModelSAERunnerConfig(**{n: v for n, v in values.items() if n not in unknown})


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys that are not config fields."""
    return [str(name) for name in values if name not in FIELD_NAMES]


def save_config(cfg: LanguageModelSAERunnerConfig, path: str | Path) -> None:
    """Writes the config as .json, .yaml or .yml."""
    path = Path(path)
    values = config_to_dict(cfg)
    if _is_yaml(path):
        path.write_text(yaml.dump(values, Dumper=_YamlDumper, sort_keys=False), encoding="utf-8")
    else:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_config(path: str | Path) -> LanguageModelSAERunnerConfig:
    """Reads a config from .json, .yaml or .yml; what the file leaves out takes its default."""
    try:
        return config_from_dict(read_config_values(path))
    except ValueError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: {error}") from error


def read_config_values(path: str | Path) -> dict[str, Any]:
    """The values that a config file gives, unchecked but for unknown fields."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file, expected .yaml or .json; check the path")
    text = path.read_text(encoding="utf-8")
    try:
        values = read_yaml(text) if _is_yaml(path) else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; correct the file") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}: found a {kind}, expected lines of `field: value`; correct the file")
    if lines := unknown_names(map(str, values), FIELD_NAMES, "the config"):
        raise ValueError(f"{path}: " + "\n".join(lines))
    return values


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for, 1e-4 being a number."""
    return yaml.load(text, Loader=_YamlLoader)


def config_differences(
    a: LanguageModelSAERunnerConfig,
    b: LanguageModelSAERunnerConfig,
    ignore: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """`{field: (value in a, value in b)}` for each field in which the two differ."""
    in_a, in_b = config_to_dict(a), config_to_dict(b)
    return {name: (in_a[name], in_b[name]) for name in FIELD_NAMES if name not in ignore and in_a[name] != in_b[name]}


def option(cfg: object, name: str) -> Any:
    """The config's value, or the default of the field where an older config lacks it."""
    if name not in FIELD_NAMES:
        guess = nearest(name, FIELD_NAMES)
        raise AttributeError(f"{name}: not a config field; did you mean {guess!r}?")
    return getattr(cfg, name) if hasattr(cfg, name) else getattr(_defaults(), name)


def with_defaults(cfg: Any) -> LanguageModelSAERunnerConfig:
    """`cfg` itself if it is a run config; else its attributes as one, unchecked, and the defaults for all it lacks.

    For configs of the mats era and of notebooks, which are any object with some of the fields.
    """
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        return cfg
    filled = copy.copy(_defaults())
    for name in FIELD_NAMES:
        if hasattr(cfg, name):
            setattr(filled, name, getattr(cfg, name))
    return filled


@functools.cache
def _defaults() -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig()


def _is_yaml(path: Path) -> bool:
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.suffix == ".json":
        return False
    raise ValueError(f"{path}: found the ending {path.suffix!r}, expected .yaml, .yml or .json; rename it")
