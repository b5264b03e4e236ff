from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sae_training.activations import harvest
from sae_training.blocks import switch_of
from sae_training.language_model import find_hook_site, load_language_model

INSIDE = (
    "ln1.hook_scale",
    "ln2.hook_normalized",
    "hook_resid_mid",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "mlp.hook_pre",
    "mlp.hook_post",
)


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo model, not the one that all tests share."""
    return load_language_model("demo", lm_dtype="float32")


@pytest.fixture
def as_written(model: Any) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls a function while all blocks run as transformer_lens wrote them."""

    def call(function: Callable[[], Any]) -> Any:
        layers = [block.original_component for block in model.blocks]
        switches = [vars(layer)["forward"] for layer in layers]
        for layer, switch in zip(layers, switches, strict=True):
            vars(layer)["forward"] = switch.hooked
        try:
            return function()
        finally:
            for layer, switch in zip(layers, switches, strict=True):
                vars(layer)["forward"] = switch

    yield call


def ids(n_prompts: int = 3, n: int = 10) -> torch.Tensor:
    return torch.randint(0, 2000, (n_prompts, n), generator=torch.Generator().manual_seed(0))


def hooked_blocks(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that run with their hook points from here on, in the order in which they do."""
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        switch = switch_of(block)
        assert switch is not None

        def hooked(*args: Any, i: int = i, forward: Any = switch.hooked, **kwargs: Any) -> Any:
            ran.append(i)
            return forward(*args, **kwargs)

        monkeypatch.setattr(switch, "hooked", hooked)
    return ran


@torch.inference_mode()
def test_blocks_without_hooks_run_without_hook_points(
    model: Any, as_written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = as_written(lambda: model(ids()))
    ran = hooked_blocks(model, monkeypatch)
    sites = [find_hook_site(model, f"blocks.{i}.hook_resid_pre") for i in range(4)]
    sites.append(find_hook_site(model, "blocks.3.hook_resid_post"))
    harvest(model, ids(), sites)
    torch.testing.assert_close(model(ids()), expected)
    assert ran == []


@pytest.mark.parametrize("name", INSIDE)
@torch.inference_mode()
def test_hook_inside_a_block_is_called_and_replaces(
    model: Any, as_written: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[torch.Tensor] = []

    def halve(activations: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(activations)
        return activations / 2

    def replaced() -> torch.Tensor:
        return model.run_with_hooks(ids(), fwd_hooks=[(f"blocks.2.{name}", halve)])

    expected = as_written(replaced)
    ran = hooked_blocks(model, monkeypatch)
    torch.testing.assert_close(replaced(), expected)
    assert ran == [2]
    torch.testing.assert_close(seen[1], seen[0])
    assert not torch.allclose(model(ids()), expected)


@torch.inference_mode()
def test_run_with_cache_still_gives_every_hook(model: Any, as_written: Any) -> None:
    expected = as_written(lambda: model.run_with_cache(ids())[1])
    _, found = model.run_with_cache(ids())
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["blocks.3.attn.hook_pattern"], expected["blocks.3.attn.hook_pattern"])


@torch.inference_mode()
def test_generation_keeps_past_keys_and_values(model: Any, as_written: Any) -> None:
    def generate() -> torch.Tensor:
        return model.generate(ids(1), max_new_tokens=5, do_sample=False, verbose=False, return_type="tokens")

    assert torch.equal(generate(), as_written(generate))


@torch.inference_mode()
def test_twins_have_the_weights_of_the_model(model: Any) -> None:
    weight = model.blocks[0].mlp.out.original_component.weight
    before = model(ids())
    saved = weight.clone()
    weight.zero_()
    try:
        assert not torch.allclose(model(ids()), before)
    finally:
        weight.copy_(saved)
    assert torch.equal(model(ids()), before)
