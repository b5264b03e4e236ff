from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from block_helpers import as_written, hooked_blocks, ids
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_training.config.io import WATCHING_FIELDS, config_differences
from sae_training.language_model.compile import compile_blocks
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model
from sae_training.language_model.sites import find_hook_site
from sae_training.language_model.twins import compiled_blocks, switch_in
from sae_training.lm_runner import language_model_sae_runner

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


def harvest_compiled(*args: Any) -> list[torch.Tensor]:
    with compiled_blocks():
        return harvest(*args)


@torch.inference_mode()
def test_blocks_without_hooks_run_without_hook_points(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_written(model, lambda: model(ids()))
    ran = hooked_blocks(model, monkeypatch)
    sites = [find_hook_site(model, f"blocks.{i}.hook_resid_pre") for i in range(4)]
    sites.append(find_hook_site(model, "blocks.3.hook_resid_post"))
    harvest(model, ids(), sites)
    torch.testing.assert_close(model(ids()), expected)
    assert ran == []


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
    ran = hooked_blocks(model, monkeypatch)
    torch.testing.assert_close(replaced(), expected)
    assert ran == [2]
    torch.testing.assert_close(seen[1], seen[0])
    assert not torch.allclose(model(ids()), expected)


@torch.inference_mode()
def test_a_part_that_is_hooked_or_replaced_is_not_passed_over(model: Any) -> None:
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


def test_resuming_with_another_compile_lm_is_another_config(small_config: Any) -> None:
    eager, compiled = small_config(), small_config(compile_lm=True)
    assert "compile_lm" in str(config_differences(eager, compiled, ignore=WATCHING_FIELDS))


# --------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.slow
def test_compiled_harvest_is_that_of_the_model(model: Any, small_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*(f"blocks.{i}.hook_resid_pre" for i in range(4)), "blocks.3.hook_resid_post"]
    outside = [find_hook_site(model, name) for name in names]
    inside = [
        *outside,
        find_hook_site(model, "blocks.2.attn.hook_z", 1),
        find_hook_site(model, "blocks.1.hook_mlp_out"),
    ]
    tokens = ids(4, 16)
    expected = harvest(model, tokens, inside)
    compile_blocks(model, True)
    try:
        ran = hooked_blocks(model, monkeypatch)
        n_compiled = hooked_blocks(model, monkeypatch, "compiled")
        found = harvest_compiled(model, tokens, outside)
        assert (ran, n_compiled) == ([], [0, 1, 2, 3])
        assert all(map(torch.equal, found, harvest_compiled(model, tokens, outside)))
        torch.testing.assert_close(found, expected[:5])
        # Hooks that come after the compilation.
        torch.testing.assert_close(harvest_compiled(model, tokens, inside), expected)
        assert (ran, n_compiled[8:]) == ([], [0, 1, 2, 3])
        find_hook_site(model, "blocks.0.hook_resid_post")  # other shapes are not compiled
        model.run_with_hooks(tokens, fwd_hooks=[])
        assert len(n_compiled) == 12
        monkeypatch.undo()
        first = language_model_sae_runner(small_config(compile_lm=True), model=model)
        again = language_model_sae_runner(small_config(compile_lm=True, run_name="again"), model=model)
        assert torch.equal(cast(Any, first).W_dec, cast(Any, again).W_dec)
        language_model_sae_runner(small_config(run_name="eager", total_training_tokens=64), model=model)
        assert all(is_eager(block) for block in model.blocks)
    finally:
        compile_blocks(model, False)


def is_eager(block: Any) -> bool:
    switch = switch_in(block)
    return switch is not None and switch.compiled is None


@pytest.mark.slow
def test_hooked_transformer_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, n_heads=2, d_head=8, n_ctx=32, d_vocab=2000, act_fn="gelu", seed=0, d_mlp=20
    )
    model = HookedTransformer(cfg)
    names = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    sites = [find_hook_site(model, name) for name in names]
    head = find_hook_site(model, "blocks.1.attn.hook_z", 1)
    expected, of_head = harvest(model, ids(), sites), harvest(model, ids(), [head])
    with torch.no_grad():
        logits = model(ids())
    compile_blocks(model, True)
    ran, n_compiled = hooked_blocks(model, monkeypatch), hooked_blocks(model, monkeypatch, "compiled")
    torch.testing.assert_close(harvest_compiled(model, ids(), sites), expected)
    assert (ran, n_compiled) == ([], [0, 1])
    torch.testing.assert_close(harvest_compiled(model, ids(), [head]), of_head)
    assert (ran, n_compiled[2:]) == ([1], [0])
    zeros: list[Any] = [("blocks.1.hook_resid_pre", lambda x, hook: x * 0)]
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), logits)
        assert not torch.allclose(model.run_with_hooks(ids(), fwd_hooks=zeros), logits)


def test_machine_without_a_compiler_is_told_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_config.cpp, "cxx", ("no-such-compiler",))
    compile_blocks(model, True)
    site = find_hook_site(model, "blocks.0.hook_resid_post")
    try:
        with (
            fresh_cache(),
            pytest.raises(ValueError, match=r"compile_lm: found True, but .* set compile_lm to False"),
        ):
            harvest_compiled(model, ids(1, 7), [site])
    finally:
        compile_blocks(model, False)


def test_model_that_cannot_be_compiled_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_training.blocks.twin_of", lambda module: None)
    cfg = HookedTransformerConfig(n_layers=1, d_model=8, d_head=4, n_ctx=8, d_vocab=50, act_fn="gelu", d_mlp=8)
    with pytest.raises(ValueError, match="compile_lm: found True with a model whose blocks"):
        compile_blocks(HookedTransformer(cfg), True)
