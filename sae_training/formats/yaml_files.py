"""Configs in YAML, read as plain values: no tags, anchors or aliases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MOST_BYTES = 2**20


def read_object(path: Path) -> dict[str, Any]:
    """What a short YAML file says by name. ValueError for one that is long, or not plain."""
    import yaml  # here, because an autoencoder needs nothing but torch and safetensors

    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: found {path.stat().st_size:,} bytes, expected a short config; check the file.")
    text = path.read_text(encoding="utf-8", errors="replace")
    if re.search(r"(?m)(?:^|[\s\[{,:-])[&*][\w-]", text):
        raise ValueError(f"{path}: holds an anchor or alias (& or *), which can grow without end; write it out.")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: no plain YAML ({error}); correct the file.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a {type(values).__name__}, expected names and values.")
    return values
