"""Hooks that stand while others run the model: which forward of a block runs, and what is left afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_helpers import block_runs, hooked_blocks, ids
from torch import Tensor

from sae_training.language_model.hooks import hooked, read_hooks
from sae_training.language_model.load import load_language_model
from sae_training.language_model.standing import lent_points, shown_tokens, standing_hook, without_hooks
from sae_training.language_model.switches import switches_restored
from sae_training.language_model.twins import compiled_blocks, switch_in

TAPPED, UNTAPPED = "blocks.1.hook_mlp_out", "blocks.1.attn.hook_rot_q"


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo model, not the one that all tests share."""
    return load_language_model("demo", lm_dtype="float32")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def halve(activations: Tensor) -> Tensor:
    return activations / 2


def minus_one(activations: Tensor) -> Tensor:
    return activations - 1


def with_hooks(model: Any, *hooks: tuple[str, Any]) -> Tensor:
    """Logits as TransformerLens computes them."""
    return model.run_with_hooks(ids(), fwd_hooks=[(name, lambda x, hook, look=look: look(x)) for name, look in hooks])


@pytest.mark.parametrize(
    ("name", "look", "runs"),
    [
        (TAPPED, torch.clone, ["twin"]),
        (TAPPED, halve, ["twin"]),
        (UNTAPPED, torch.clone, ["hooked", "twin"]),
        (UNTAPPED, halve, ["hooked"]),
        ("blocks.1.hook_resid_post", halve, ["twin"]),
    ],
)
def test_a_block_runs_so_that_no_bit_moves_without_a_change(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str, look: Any, runs: list[str]
) -> None:
    expected, before = with_hooks(model, (name, look)), model(ids())
    ran = block_runs(model, monkeypatch)
    with standing_hook(model, name, look):
        found = model(ids())
    assert [run for layer, run in ran if layer == 1] == runs
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, before) is (look is torch.clone)
    ran.clear()
    assert torch.equal(model(ids()), before)
    assert hooked_blocks(ran) == []


@pytest.mark.parametrize("name", [TAPPED, UNTAPPED])
def test_it_stands_beside_hooks_of_all_kinds(model: Any, name: str) -> None:
    seen: list[Tensor] = []
    with standing_hook(model, name, halve):
        (read,) = read_hooks(model, ids(), {name}, None).values()
        _, cache = model.run_with_cache(ids(), names_filter=name)
        with hooked(model, [(name, seen.append)], [("blocks.1.hook_resid_pre", minus_one), (name, minus_one)]):
            replaced = model(ids())
        then = with_hooks(model, (name, minus_one))
        with standing_hook(model, name, minus_one), standing_hook(model, "blocks.2.hook_attn_out", halve):
            two = model(ids())
        alone = model(ids())
    expected = with_hooks(model, (name, halve), (name, minus_one))
    (plain,) = read_hooks(model, ids(), {name}, None).values()
    torch.testing.assert_close(read, plain / 2)
    torch.testing.assert_close(cache[name], plain / 2)
    torch.testing.assert_close(then, expected)
    torch.testing.assert_close(alone, with_hooks(model, (name, halve)))
    torch.testing.assert_close(
        two, with_hooks(model, (name, halve), (name, minus_one), ("blocks.2.hook_attn_out", halve))
    )
    torch.testing.assert_close(
        replaced, with_hooks(model, ("blocks.1.hook_resid_pre", minus_one), (name, halve), (name, minus_one))
    )
    assert len(seen) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_two_places_with_one_tap_come_in_the_order_of_the_model(model: Any, order: int) -> None:
    hooks = [("blocks.1.ln2.hook_normalized", halve), ("blocks.1.ln2.hook_out", minus_one)]
    expected = with_hooks(model, *hooks)
    (first, second), before = hooks[::order], model(ids())
    with standing_hook(model, *first), standing_hook(model, *second):
        torch.testing.assert_close(model(ids()), expected)
    assert torch.equal(model(ids()), before)


def test_generation_with_a_cache_of_keys_is_that_without(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    start = ids(1, 12)
    for look in (torch.clone, halve):
        with standing_hook(model, UNTAPPED, look):
            cached, whole = (model.generate(start, use_past_kv_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, whole)


@pytest.mark.parametrize("name", [TAPPED, UNTAPPED])
def test_gradients_pass_also_where_nothing_is_replaced(model: Any, name: str) -> None:
    before, added = model(ids()), torch.zeros((), requires_grad=True)

    def gradient(logits: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), added)
        return found

    with torch.enable_grad():
        expected = gradient(with_hooks(model, (name, lambda x: x + added)))
        with standing_hook(model, name, lambda x: x + added):
            logits = model(ids())
        found = gradient(logits)
    assert torch.equal(logits, before)
    assert expected != 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_block_does_not_pass_over_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    switch: Any = switch_in(model.blocks[1])
    monkeypatch.setattr(switch, "compiled", lambda *args, **kwargs: pytest.fail("it was passed over"))
    with standing_hook(model, TAPPED, halve):
        expected = model(ids())
        with compiled_blocks():
            assert torch.equal(model(ids()), expected)


def test_others_cannot_remove_it_but_its_end_does(model: Any) -> None:
    before = model(ids())
    with pytest.raises(ZeroDivisionError), standing_hook(model, TAPPED, halve):
        inside = model(ids())
        model.reset_hooks()
        assert torch.equal(model(ids()), inside)
        model.reset_hooks(including_permanent=True)
        1 / 0  # noqa: B018
    assert torch.equal(model(ids()), before)
    assert not model.hook_dict[TAPPED].fwd_hooks
    switch = switch_in(model.blocks[1])
    assert switch is not None
    assert not switch.standing


def test_a_short_pass_can_go_without_any_hooks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = model(ids()), []
    point = model.hook_dict["blocks.1.hook_attn_out"]
    point.add_hook(lambda activations, hook: calls.append(1))
    try:
        with standing_hook(model, TAPPED, halve), standing_hook(model, UNTAPPED, halve):
            inside = model(ids())
            assert len(calls) == 1
            with without_hooks(model):
                assert torch.equal(model(ids()), before)
            assert len(calls) == 1
            assert torch.equal(model(ids()), inside)
    finally:
        point.remove_hooks()
    assert torch.equal(model(ids()), before)


def test_lent_points_are_points_of_the_model_for_a_while(model: Any) -> None:
    name, names = "blocks.1.hook_resid_post.hook_new", list(model.hook_dict)
    with lent_points(model, "blocks.1.hook_resid_post", ["hook_new"]) as points:
        with standing_hook(model, "blocks.1.hook_resid_post", points["hook_new"]):
            _, cache = model.run_with_cache(ids())
            (read,) = read_hooks(model, ids(), {name}, None).values()
            changed = with_hooks(model, (name, halve))
        assert model.blocks[1].hook_resid_post.hook_new is points["hook_new"] is model.hook_dict[name]
    torch.testing.assert_close(cache[name], cache["blocks.1.hook_resid_post"])
    torch.testing.assert_close(read, cache[name])
    torch.testing.assert_close(changed, with_hooks(model, ("blocks.1.hook_resid_post", halve)))
    assert list(model.hook_dict) == names
    assert switch_in(model.blocks[1]) is not None
    with lent_points(model, "blocks.1.hook_resid_post", ["hook_new"]) as again:
        assert model.hook_dict[name] is again["hook_new"] is not points["hook_new"]


def test_token_ids_are_shown_however_they_come(model: Any) -> None:
    seen: list[Tensor] = []
    with shown_tokens(model, seen.append):
        model(ids())
        model("Once upon a time")
        model.run_with_cache(ids(2, 5))
    model(ids())
    expected = [ids(), model.to_tokens("Once upon a time"), ids(2, 5)]
    assert [tokens.tolist() for tokens in seen] == [tokens.tolist() for tokens in expected]


def test_switches_are_turned_off_again(model: Any) -> None:
    model.set_use_hook_mlp_in(True)
    with pytest.raises(ZeroDivisionError), switches_restored(model):
        model.set_use_attn_result(True)
        1 / 0  # noqa: B018
    assert (model.cfg.use_attn_result, model.cfg.use_hook_mlp_in) == (False, True)
    model.set_use_hook_mlp_in(False)


def test_a_model_that_had_standing_hooks_can_be_freed() -> None:
    model = load_language_model("demo", lm_dtype="float32")
    with lent_points(model, TAPPED, ["hook_new"]) as points, standing_hook(model, TAPPED, points["hook_new"]):
        read_hooks(model, ids(1, 3), {f"{TAPPED}.hook_new"}, None)
    gone = weakref.ref(model)
    del model, points
    gc.collect()
    assert gone() is None
