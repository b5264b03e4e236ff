"""Runs the blocks of a language model as TransformerLens wrote them, and counts which run how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_training.language_model.twins import switch_in


def ids(n_prompts: int = 3, n: int = 10) -> torch.Tensor:
    return torch.randint(0, 2000, (n_prompts, n), generator=torch.Generator().manual_seed(0))


def as_written(model: Any, function: Callable[[], Any]) -> Any:
    """What `function` returns while no block of a bridge has a twin."""
    layers = [block.original_component for block in model.blocks]
    switches = [vars(layer)["forward"] for layer in layers]
    for layer, switch in zip(layers, switches, strict=True):
        vars(layer)["forward"] = switch.hooked
    try:
        return function()
    finally:
        for layer, switch in zip(layers, switches, strict=True):
            vars(layer)["forward"] = switch


def block_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Block and forward ("hooked", "twin" or "compiled") of all that runs from here on, in order."""
    ran: list[tuple[int, str]] = []

    def counted(run: tuple[int, str], forward: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            ran.append(run)
            return forward(*args, **kwargs)

        return count

    for i, block in enumerate(model.blocks):
        switch = switch_in(block)
        assert switch is not None
        for name in ("hooked", "twin", "compiled"):
            if getattr(switch, name) is not None:
                monkeypatch.setattr(switch, name, counted((i, name), getattr(switch, name)))
    return ran


def hooked_blocks(ran: list[tuple[int, str]]) -> list[int]:
    """The blocks that ran with their hook points."""
    return [i for i, name in ran if name == "hooked"]
