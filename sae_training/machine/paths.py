"""Paths of this machine in a config and in commands."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TypeVar

from sae_training.config.fields import Source
from sae_training.demo_data import bundled_model, bundled_text

C = TypeVar("C", bound=Source)

PATH_FIELDS = ("model_name", "dataset_path", "eval_dataset_path", "from_pretrained_path", "cached_activations_path")
"""The fields of a config that may name a path of this machine."""


def command(*words: str | Path) -> str:
    """Return a command of this package, quoted for a shell: python -m sae_training resume 'runs/a b'."""
    return shlex.join(["python", "-m", "sae_training", *map(str, words)])


def with_absolute_paths(cfg: C) -> C:
    """Return `cfg` with local models and data by absolute path.

    The run can then be resumed and loaded from any working directory.
    """
    changes = {}
    for name in PATH_FIELDS:
        value = getattr(cfg, name, None)
        if isinstance(value, list):
            changes[name] = [absolute(name, path) for path in value]
        elif value is not None:
            changes[name] = absolute(name, value)
    return dataclasses.replace(cfg, **changes)


def absolute(field: str, value: str) -> str:
    """Return the value by absolute path if it is a path here, else as it is."""
    return str(Path(value).expanduser().resolve()) if is_local(field, value) else value


def is_local(field: str, value: str) -> bool:
    """Return whether the value is a path here.

    A bare word is a path if it holds what the field needs, but "demo" is a name.
    """
    path = Path(value).expanduser()
    if os.sep in value or path.is_file():
        return path.exists()
    if value == bundled_model(value) == bundled_text(value):
        return (path / "config.json").is_file() if field == "model_name" else path.is_dir() and any(path.iterdir())
    return False


# ------------------------------------------------------------------------------------- what lies elsewhere than before


def paths_of(cfg: Source) -> dict[str, list[Path]]:
    """Return the absolute paths that the fields of `cfg` name, whether they are here or not."""
    found = {}
    for name in PATH_FIELDS:
        value = getattr(cfg, name, None)
        values = value if isinstance(value, list) else [value]
        found[name] = [Path(path) for path in values if isinstance(path, str) and os.path.isabs(path)]
    return {name: paths for name, paths in found.items() if paths}


def same_or_moved(old: object, new: object) -> bool:
    """Return whether `new` is `old`, or what it named, moved: a path that is gone, and one of its name that is here."""
    if old == new:
        return True
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(same_or_moved, old, new))
    if not (isinstance(old, str) and isinstance(new, str) and os.path.isabs(old) and os.path.isabs(new)):
        return False
    return Path(old).name == Path(new).name and not os.path.exists(old) and os.path.exists(new)
