"""Changed passes that begin above the blocks they share with the clean pass: the same figures as whole passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_training.language_model.blocks_below import BlocksBelow, n_blocks_below
from sae_training.language_model.hooks import hooked
from sae_training.language_model.load import hooked_transformer_class
from sae_training.language_model.twins import switch_in


@pytest.mark.parametrize(
    ("names", "n"),
    [
        (["blocks.2.hook_resid_post"], 3),
        (["blocks.2.hook_resid_pre"], 2),
        (["blocks.2.attn.hook_z", "blocks.1.attn.hook_pattern"], 1),
        (["blocks.3.ln2.hook_out"], 3),
        (["hook_embed"], 0),
        (["blocks.2.hook_mlp_out", "ln_final.hook_normalized"], 0),
        ([], 0),
    ],
)
def test_blocks_that_hooks_cannot_change(names: list[str], n: int) -> None:
    assert n_blocks_below(names) == n


@pytest.fixture(scope="module")
def hooked_transformer() -> Any:
    torch.manual_seed(0)
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=12, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", seed=0
    )
    return HookedTransformer(config).eval()


HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre",
         "blocks.2.attn.hook_z", "hook_embed")  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", ["demo_model", "hooked_transformer"])
def test_pass_above_shared_blocks_is_the_whole_pass(kind: str, hook: str, request: pytest.FixtureRequest) -> None:
    model: Any = request.getfixturevalue(kind)
    tokens = torch.arange(24).reshape(2, 12)
    n = n_blocks_below([hook])
    ran: list[Any] = []
    below = BlocksBelow(model, [n])
    half: Callable[[torch.Tensor], torch.Tensor] = lambda activations: activations / 2  # noqa: E731
    with torch.no_grad():
        with hooked(model, []), below.recorded():
            clean = model(tokens, return_type="logits")
        with hooked(model, [], [(hook, half)]):
            expected = model(tokens, return_type="logits")
        forwards = {i: getattr(block, "original_component", block).forward for i, block in enumerate(model.blocks)}
        with hooked(model, [], [(hook, half)]), below.skipped(n):
            for i in range(n):
                now = getattr(model.blocks[i], "original_component", model.blocks[i]).forward
                ran.append(now is not forwards[i])
            changed = model(tokens, return_type="logits")
        after = model(tokens, return_type="logits")
    assert ran == [True] * n
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, clean)
    assert torch.equal(after, clean)  # nothing is left behind
    assert all(switch_in(block) is not None for block in model.blocks) == (kind == "demo_model")


@pytest.mark.parametrize("kind", ["demo_model", "hooked_transformer"])
def test_hooks_of_others_at_the_output_of_a_shared_block_count_once(kind: str, request: pytest.FixtureRequest) -> None:
    model: Any = request.getfixturevalue(kind)
    tokens, hook = torch.arange(24).reshape(2, 12), "blocks.1.hook_resid_post"
    below = BlocksBelow(model, [2])
    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, lambda activations, hook: activations * activations)]):
        expected = model(tokens)
        with hooked(model, []), below.recorded():
            assert torch.equal(model(tokens), expected)
        with hooked(model, [], [(hook, torch.clone)]), below.skipped(2):
            assert torch.equal(model(tokens), expected)
