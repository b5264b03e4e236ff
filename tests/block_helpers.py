"""Running the blocks of a language model as transformer_lens wrote them, and counting those that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_training.blocks import switch_in


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


def hooked_blocks(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that run with their hook points from here on, in the order in which they do."""
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        switch = switch_in(block)
        assert switch is not None

        def hooked(*args: Any, i: int = i, forward: Any = switch.hooked, **kwargs: Any) -> Any:
            ran.append(i)
            return forward(*args, **kwargs)

        monkeypatch.setattr(switch, "hooked", hooked)
    return ran
