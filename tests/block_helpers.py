"""Running the blocks of a language model as transformer_lens wrote them, and counting which run how."""

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


def hooked_blocks(model: Any, monkeypatch: pytest.MonkeyPatch, forward: str = "hooked") -> list[int]:
    """Blocks that run with their hook points from here on (or that other `forward` of theirs), in the order in which
    they do.
    """
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        switch = switch_in(block)
        assert switch is not None
        original = getattr(switch, forward)

        def counted(*args: Any, i: int = i, run: Any = original, **kwargs: Any) -> Any:
            ran.append(i)
            return run(*args, **kwargs)

        monkeypatch.setattr(switch, forward, counted)
    return ran
