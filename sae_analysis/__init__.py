"""Exploring trained autoencoders. Imports sae_training, never the other way round."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_analysis.analysis import Analysis, open_analysis
    from sae_analysis.build import build_analysis

__all__ = ["Analysis", "build_analysis", "open_analysis"]

WHERE = {"Analysis": "analysis", "build_analysis": "build", "open_analysis": "analysis"}


def __getattr__(name: str) -> Any:
    """Import on demand, because the readers of a store need no torch."""
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)
