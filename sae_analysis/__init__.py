"""Exploring trained autoencoders: `build_analysis`, `open_analysis`, `Analysis`.

Imports sae_training, never the other way round. The three names are imported when they are first asked for, because
reading a finished analysis needs neither torch nor a language model.
"""

from __future__ import annotations

import importlib
from typing import Any

WHERE = {"Analysis": "analysis", "build_analysis": "build", "open_analysis": "analysis"}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)
