from __future__ import annotations

from typing import Any

import pytest
import torch
from block_helpers import as_written, block_runs, hooked_blocks, ids
from small import N_LAYERS

from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model
from sae_training.language_model.sites import find_hook_site

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


@torch.inference_mode()
def test_blocks_without_hooks_run_without_hook_points(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_written(model, lambda: model(ids()))
    ran = block_runs(model, monkeypatch)
    sites = [find_hook_site(model, f"blocks.{i}.hook_resid_pre") for i in range(N_LAYERS)]
    sites.append(find_hook_site(model, f"blocks.{N_LAYERS - 1}.hook_resid_post"))
    harvest(model, ids(), sites)
    torch.testing.assert_close(model(ids()), expected)
    assert hooked_blocks(ran) == []


@pytest.mark.parametrize("name", INSIDE)
@torch.inference_mode()
def test_hook_inside_a_block_is_called_and_replaces(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[torch.Tensor] = []

    def halve(activations: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(activations)
        return activations / 2

    def replaced() -> torch.Tensor:
        return model.run_with_hooks(ids(), fwd_hooks=[(f"blocks.2.{name}", halve)])

    expected = as_written(model, replaced)
    ran = block_runs(model, monkeypatch)
    torch.testing.assert_close(replaced(), expected)
    assert hooked_blocks(ran) == [2]
    torch.testing.assert_close(seen[1], seen[0])
    assert not torch.allclose(model(ids()), expected)


@torch.inference_mode()
def test_a_hooked_or_replaced_part_of_a_block_runs(model: Any) -> None:
    mlp = model.blocks[2].original_component.mlp
    calls: list[int] = []
    handle = mlp.register_forward_hook(lambda *_: calls.append(1))
    model(ids())
    assert calls == [1]
    handle.remove()
    untouched = model(ids())
    assert calls == [1]

    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros_like(x)

    layer = model.blocks[2].original_component
    layer._modules["mlp"] = Nothing()
    try:
        expected = as_written(model, lambda: model(ids()))
        torch.testing.assert_close(model(ids()), expected)
        assert not torch.allclose(expected, untouched)
    finally:
        layer._modules["mlp"] = mlp
    assert torch.equal(model(ids()), untouched)


@torch.inference_mode()
def test_run_with_cache_still_gives_every_hook(model: Any) -> None:
    expected = as_written(model, lambda: model.run_with_cache(ids())[1])
    _, found = model.run_with_cache(ids())
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["blocks.3.attn.hook_pattern"], expected["blocks.3.attn.hook_pattern"])


@torch.inference_mode()
def test_generation_keeps_past_keys_and_values(model: Any) -> None:
    def generate() -> torch.Tensor:
        return model.generate(ids(1), max_new_tokens=5, do_sample=False, verbose=False, return_type="tokens")

    assert torch.equal(generate(), as_written(model, generate))


@torch.inference_mode()
def test_twins_share_the_weights_of_the_model(model: Any) -> None:
    weight = model.blocks[0].mlp.out.original_component.weight
    before = model(ids())
    saved = weight.clone()
    weight.zero_()
    try:
        assert not torch.allclose(model(ids()), before)
    finally:
        weight.copy_(saved)
    assert torch.equal(model(ids()), before)
