from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from block_helpers import as_written, hooked_blocks, ids
from torch import Tensor

from sae_training.activations import harvest
from sae_training.blocks import switch_in
from sae_training.hooks import hooked, read_hooks
from sae_training.language_model import find_hook_site, load_language_model

TAPPED = (
    "hook_resid_mid",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
)
UNTAPPED = ("ln2.hook_scale", "attn.hook_rot_q", "attn.hook_pattern")


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo model, not the one that all tests share."""
    return load_language_model("demo", lm_dtype="float32")


@contextmanager
def halved_mlp(model: Any, layer: int) -> Iterator[None]:
    """With a hook of somebody else's, inside a block."""
    point = model.hook_dict[f"blocks.{layer}.hook_mlp_out"]
    point.add_hook(lambda activations, hook: activations / 2)
    try:
        yield
    finally:
        point.remove_hooks()


def halve(activations: Tensor) -> Tensor:
    return activations / 2


# ----------------------------------------------------------------------------------------------------------- reading


def test_places_inside_a_block_are_read_without_its_hook_points(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"blocks.{layer}.{name}" for layer in range(4) for name in TAPPED}
    expected = as_written(model, lambda: read_hooks(model, ids(), names, None))
    ran = hooked_blocks(model, monkeypatch)
    found = read_hooks(model, ids(), names, None)
    assert ran == []
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def test_other_places_are_read_from_a_second_run_of_the_block(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"blocks.{layer}.{name}" for layer in (1, 3) for name in UNTAPPED}
    expected = as_written(model, lambda: read_hooks(model, ids(), names, None))
    ran = hooked_blocks(model, monkeypatch)
    torch.testing.assert_close(read_hooks(model, ids(), names, None), expected)
    assert ran == [1, 3]


@pytest.mark.parametrize("name", [*TAPPED[:3], "attn.hook_z", "attn.hook_rot_q"])
def test_what_is_read_does_not_depend_on_where_else_is_read(model: Any, name: str) -> None:
    hooks = (name, "hook_mlp_out", "attn.hook_pattern", "hook_resid_post")
    names = {f"blocks.{i}.{hook}" for i in (0, 1, 3) for hook in hooks}
    together = read_hooks(model, ids(), names, 4)
    for each in names:
        assert torch.equal(read_hooks(model, ids(), {each}, 4)[each], together[each]), each


def test_last_block_runs_once_where_only_its_inside_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = switch_in(model.blocks[2])
    assert switch is not None
    ran: list[str] = []
    for name in ("hooked", "twin", "tapped"):
        forward = getattr(switch, name)

        def counted(*args: Any, name: str = name, forward: Any = forward, **kwargs: Any) -> Any:
            ran.append(name)
            return forward(*args, **kwargs)

        monkeypatch.setattr(switch, name, counted)
    read_hooks(model, ids(), {"blocks.2.attn.hook_rot_q"}, 3)
    assert ran == ["hooked"]
    read_hooks(model, ids(), {"blocks.2.attn.hook_rot_q", "blocks.2.hook_resid_post"}, 3)
    assert ran == ["hooked", "hooked", "twin"]
    read_hooks(model, ids(), {"blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"}, 3)
    assert ran[3:] == ["tapped"]


@pytest.mark.parametrize("name", ["blocks.1.hook_mlp_out", "blocks.1.attn.hook_pattern", "blocks.2.hook_resid_post"])
def test_hooks_of_others_keep_their_effect(model: Any, name: str) -> None:
    untouched = read_hooks(model, ids(), {"blocks.2.hook_resid_post"}, None)["blocks.2.hook_resid_post"]
    with halved_mlp(model, 1):
        expected = as_written(model, lambda: read_hooks(model, ids(), {"blocks.2.hook_resid_post"}, None))
        found = read_hooks(model, ids(), {name, "blocks.2.hook_resid_post"}, None)
    torch.testing.assert_close(found["blocks.2.hook_resid_post"], expected["blocks.2.hook_resid_post"])
    assert not torch.allclose(found["blocks.2.hook_resid_post"], untouched)


def test_hook_that_holds_float32_is_harvested_in_the_precision_of_the_model() -> None:
    model = load_language_model("demo", lm_dtype="bfloat16")
    site = find_hook_site(model, "blocks.2.ln2.hook_normalized")
    (found,) = harvest(model, ids(), [site])
    (expected,) = as_written(model, lambda: harvest(model, ids(), [site]))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).float().norm() < 0.01 * expected.float().norm()


# --------------------------------------------------------------------------------------------------------- replacing


@pytest.mark.parametrize("name", [*TAPPED, *UNTAPPED, "hook_resid_pre", "hook_resid_post"])
@torch.inference_mode()
def test_replacing_is_that_of_transformer_lens(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    full_name = f"blocks.2.{name}"
    fwd_hooks = [(full_name, lambda activations, hook: activations / 2)]
    expected = as_written(model, lambda: model.run_with_hooks(ids(), fwd_hooks=fwd_hooks))
    ran = hooked_blocks(model, monkeypatch)
    with hooked(model, (), [(full_name, halve)]):
        found = model(ids())
    torch.testing.assert_close(found, expected)
    assert ran == ([2] if name in UNTAPPED else [])
    assert not torch.allclose(model(ids()), expected)


@pytest.mark.parametrize("name", ["hook_mlp_out", "attn.hook_z", "attn.hook_q", "ln2.hook_normalized"])
@torch.inference_mode()
def test_replacing_by_the_same_changes_no_bit(model: Any, name: str) -> None:
    with hooked(model, (), [(f"blocks.{layer}.{name}", torch.clone) for layer in range(4)]):
        found = model(ids())
    assert torch.equal(found, model(ids()))


@torch.inference_mode()
def test_a_place_without_a_tap_sees_what_is_replaced_before_it(model: Any) -> None:
    patterns: list[Tensor] = []
    read = [("blocks.1.attn.hook_pattern", patterns.append)]
    for replacements in ([], [("blocks.1.attn.hook_q", halve)]):
        with hooked(model, read, replacements):
            model(ids())
    clean, changed = patterns
    fwd_hooks = [
        ("blocks.1.attn.hook_q", lambda activations, hook: activations / 2),
        ("blocks.1.attn.hook_pattern", lambda activations, hook: patterns.append(activations)),
    ]
    as_written(model, lambda: model.run_with_hooks(ids(), fwd_hooks=fwd_hooks))
    torch.testing.assert_close(changed, patterns[2])
    assert not torch.allclose(changed, clean)


@torch.inference_mode()
def test_nothing_stays_after_an_error(model: Any) -> None:
    expected = model(ids())

    def fail(activations: Tensor) -> None:
        raise RuntimeError("no")

    for name in ("hook_mlp_out", "attn.hook_pattern", "hook_resid_post"):
        with pytest.raises(RuntimeError, match="no"), hooked(model, [(f"blocks.1.{name}", fail)]):
            model(ids())
    assert torch.equal(model(ids()), expected)
