from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from block_helpers import block_runs, ids
from small import N_LAYERS
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from sae_training.config.io import WATCHING_FIELDS, config_differences
from sae_training.language_model.compile import compile_blocks
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import hooked_transformer_class, load_language_model
from sae_training.language_model.sites import find_hook_site
from sae_training.language_model.twins import compiled_blocks


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo model, not the one that all tests share."""
    return load_language_model("demo", lm_dtype="float32")


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    compile_blocks(model, True)
    try:
        yield
    finally:
        compile_blocks(model, False)


def harvest_compiled(*args: Any) -> list[torch.Tensor]:
    with compiled_blocks():
        return harvest(*args)


@pytest.mark.slow
def test_compiled_harvest_is_that_of_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*(f"blocks.{i}.hook_resid_pre" for i in range(N_LAYERS)), f"blocks.{N_LAYERS - 1}.hook_resid_post"]
    outside = [find_hook_site(model, name) for name in names]
    head, mlp = find_hook_site(model, "blocks.2.attn.hook_z", 1), find_hook_site(model, "blocks.1.hook_mlp_out")
    tokens = ids(4, 16)
    expected = harvest(model, tokens, [*outside, head, mlp])
    with compiled(model):
        ran = block_runs(model, monkeypatch)
        found = harvest_compiled(model, tokens, outside)
        assert ran == [(i, "compiled") for i in range(N_LAYERS)]
        assert all(map(torch.equal, found, harvest_compiled(model, tokens, outside)))
        torch.testing.assert_close(found, expected[: len(outside)])
        ran.clear()  # from here on, hooks that come after the compilation
        found = harvest_compiled(model, tokens, [*outside, head, mlp])
        torch.testing.assert_close(found, expected)
        twice = [(1, "twin"), (1, "compiled"), (2, "twin"), (2, "compiled")]
        assert ran == [(0, "compiled"), *twice, *((i, "compiled") for i in range(3, N_LAYERS))]
        ran.clear()
        find_hook_site(model, "blocks.0.hook_resid_post")  # other shapes are not compiled
        model.run_with_hooks(tokens, fwd_hooks=[])
        assert ran == [(0, "twin"), *((i, "twin") for i in range(N_LAYERS))]


@pytest.mark.slow
def test_hooked_transformer_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hooked_transformer(n_layers=2)
    names = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    sites = [find_hook_site(model, name) for name in names]
    head = find_hook_site(model, "blocks.1.attn.hook_z", 1)
    expected, of_head = harvest(model, ids(), sites), harvest(model, ids(), [head])
    with torch.no_grad():
        logits = model(ids())
    compile_blocks(model, True)
    ran = block_runs(model, monkeypatch)
    torch.testing.assert_close(harvest_compiled(model, ids(), sites), expected)
    assert ran == [(0, "compiled"), (1, "compiled")]
    torch.testing.assert_close(harvest_compiled(model, ids(), [head]), of_head)
    assert ran[2:] == [(0, "compiled"), (1, "hooked")]
    zeros: list[Any] = [("blocks.1.hook_resid_pre", lambda x, hook: x * 0)]
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), logits)
        assert not torch.allclose(model.run_with_hooks(ids(), fwd_hooks=zeros), logits)


def test_machine_without_a_compiler_is_told_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_config.cpp, "cxx", ("no-such-compiler",))
    site = find_hook_site(model, "blocks.0.hook_resid_post")
    refused = pytest.raises(ValueError, match=r"compile_lm: found True, but .* set compile_lm to False")
    with compiled(model), fresh_cache(), refused:
        harvest_compiled(model, ids(1, 7), [site])


def test_model_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hooked_transformer(n_layers=1)
    monkeypatch.setattr("sae_training.language_model.compile.twin_of", lambda module, copies: None)
    with pytest.raises(ValueError, match="compile_lm: found True with a model whose blocks"):
        compile_blocks(model, True)


def test_resuming_with_another_compile_lm_is_another_config(small_config: Any) -> None:
    eager, compiled = small_config(), small_config(compile_lm=True)
    assert "compile_lm" in str(config_differences(eager, compiled, ignore=WATCHING_FIELDS))


def tiny_hooked_transformer(n_layers: int) -> Any:
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=n_layers, d_model=16, n_heads=2, d_head=8, n_ctx=32, d_vocab=2000, act_fn="gelu", seed=0, d_mlp=20
    )
    return HookedTransformer(cfg)
