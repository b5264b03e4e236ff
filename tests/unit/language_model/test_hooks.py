from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from block_helpers import as_written, block_runs, hooked_blocks, ids
from small import VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, PhiConfig

from sae_training.demo_data import bundled_model
from sae_training.language_model.harvest import harvest
from sae_training.language_model.hooks import hooked, read_hooks
from sae_training.language_model.load import load_language_model
from sae_training.language_model.sites import find_hook_site
from sae_training.language_model.twins import switch_in

TAPPED = (
    "hook_resid_mid",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_normalized",
    "attn.hook_in",
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
    """In here, a hook of somebody else inside block `layer` halves what its MLP returns."""
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
    ran = block_runs(model, monkeypatch)
    found = read_hooks(model, ids(), names, None)
    assert hooked_blocks(ran) == []
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def test_other_places_are_read_from_a_second_run_of_the_block(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"blocks.{layer}.{name}" for layer in (1, 3) for name in UNTAPPED}
    expected = as_written(model, lambda: read_hooks(model, ids(), names, None))
    ran = block_runs(model, monkeypatch)
    torch.testing.assert_close(read_hooks(model, ids(), names, None), expected)
    assert hooked_blocks(ran) == [1, 3]


@pytest.mark.parametrize("name", [*TAPPED[:3], "attn.hook_z", "attn.hook_rot_q"])
def test_a_read_tensor_does_not_depend_on_where_else_is_read(model: Any, name: str) -> None:
    hooks = (name, "hook_mlp_out", "attn.hook_pattern", "hook_resid_post")
    names = {f"blocks.{i}.{hook}" for i in (0, 1, 3) for hook in hooks}
    together = read_hooks(model, ids(), names, 4)
    for each in names:
        assert torch.equal(read_hooks(model, ids(), {each}, 4)[each], together[each]), each


def test_last_block_runs_once_where_only_its_inside_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = block_runs(model, monkeypatch)
    read_hooks(model, ids(), {"blocks.2.attn.hook_rot_q"}, 3)
    assert ran == [(0, "twin"), (1, "twin"), (2, "hooked")]
    ran.clear()
    read_hooks(model, ids(), {"blocks.2.attn.hook_rot_q", "blocks.2.hook_resid_post"}, 3)
    assert ran[2:] == [(2, "hooked"), (2, "twin")]
    ran.clear()
    read_hooks(model, ids(), {"blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"}, 3)
    assert ran[2:] == [(2, "twin")]


@pytest.mark.parametrize("name", ["blocks.1.hook_mlp_out", "blocks.1.attn.hook_pattern", "blocks.2.hook_resid_post"])
def test_hooks_of_others_keep_their_effect(model: Any, name: str) -> None:
    untouched = read_hooks(model, ids(), {"blocks.2.hook_resid_post"}, None)["blocks.2.hook_resid_post"]
    with halved_mlp(model, 1):
        expected = as_written(model, lambda: read_hooks(model, ids(), {"blocks.2.hook_resid_post"}, None))
        found = read_hooks(model, ids(), {name, "blocks.2.hook_resid_post"}, None)
        still = read_hooks(model, ids(), {"blocks.2.hook_resid_post"}, None)  # after our hooks beside them are gone
    for each in (found, still):
        torch.testing.assert_close(each["blocks.2.hook_resid_post"], expected["blocks.2.hook_resid_post"])
        assert not torch.allclose(each["blocks.2.hook_resid_post"], untouched)


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
def test_replacing_equals_that_of_transformer_lens(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    full_name = f"blocks.2.{name}"
    fwd_hooks = [(full_name, lambda activations, hook: activations / 2)]
    expected = as_written(model, lambda: model.run_with_hooks(ids(), fwd_hooks=fwd_hooks))
    ran = block_runs(model, monkeypatch)
    with hooked(model, (), [(full_name, halve)]):
        found = model(ids())
    torch.testing.assert_close(found, expected)
    assert hooked_blocks(ran) == ([2] if name in UNTAPPED else [])
    assert not torch.allclose(model(ids()), expected)


@pytest.mark.parametrize("name", ["hook_mlp_out", "attn.hook_z", "attn.hook_q", "ln2.hook_normalized"])
@torch.inference_mode()
def test_replacing_a_tensor_by_itself_changes_no_bit(model: Any, name: str) -> None:
    with hooked(model, (), [(f"blocks.{layer}.{name}", torch.clone) for layer in range(4)]):
        found = model(ids())
    assert torch.equal(found, model(ids()))


@torch.inference_mode()
def test_a_place_without_a_tap_shows_what_was_replaced_before_it(model: Any) -> None:
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
def test_places_with_one_tap_are_replaced_in_the_order_of_the_model(model: Any) -> None:
    def minus_one(activations: Tensor) -> Tensor:
        return activations - 1

    expected = as_written(
        model,
        lambda: model.run_with_hooks(
            ids(),
            fwd_hooks=[
                ("blocks.1.ln2.hook_out", lambda activations, hook: activations - 1),
                ("blocks.1.ln2.hook_normalized", lambda activations, hook: activations / 2),
            ],
        ),
    )
    with hooked(model, (), [("blocks.1.ln2.hook_out", minus_one), ("blocks.1.ln2.hook_normalized", halve)]):
        found = model(ids())
    torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_no_hook_is_left_after_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model(ids())

    def fail(activations: Tensor) -> None:
        raise RuntimeError("no")

    for name in ("hook_mlp_out", "attn.hook_pattern", "hook_resid_post"):
        with pytest.raises(RuntimeError, match="no"), hooked(model, [(f"blocks.1.{name}", fail)]):
            model(ids())
    ran = block_runs(model, monkeypatch)
    assert torch.equal(model(ids()), expected)
    assert hooked_blocks(ran) == []
    switches = [switch_in(block) for block in model.blocks]
    assert all(switch is not None and not switch.planned for switch in switches)


def test_one_block_is_hooked_once_at_a_time(model: Any) -> None:
    look = [("blocks.1.hook_mlp_out", halve)]
    with hooked(model, look), pytest.raises(RuntimeError, match="hooked already"), hooked(model, look):
        pass


def test_a_model_that_was_read_can_be_freed() -> None:
    model = load_language_model("demo", lm_dtype="float32")
    point = model.hook_dict["blocks.1.hook_mlp_out"]
    point.add_hook(lambda activations, hook, model=model: None)  # as a notebook's hooks refer to their model
    read_hooks(model, ids(1, 3), {"blocks.1.hook_mlp_out"}, None)
    gone = weakref.ref(model)
    del model, point
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------------ other models

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Any] = {
    "after each part a norm": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=20),
    "attention beside the MLP": PhiConfig(**SIZES),
    "queries, keys and values in one": GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=VOCAB, n_positions=64),
}


@pytest.fixture(params=MODELS)
def other_model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A tiny random model of another architecture, whose norms have weights to fold."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(MODELS[request.param])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5))
    made.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bundled_model("demo")).save_pretrained(tmp_path)
    return load_language_model(str(tmp_path), lm_dtype="float32")


@torch.inference_mode()
def test_other_models_are_read_and_replaced_as_transformer_lens_does(other_model: Any) -> None:
    tokens = ids(2, 40)
    model, switches = other_model, [switch_in(block) for block in other_model.blocks]
    names = {f"blocks.1.{name}" for name in TAPPED} & model.hook_dict.keys()
    assert len(names) > 6
    without_twins = all(switch is None for switch in switches)  # fused weights: the processed ones are not in them

    def in_its_own_way(function: Any) -> Any:
        return function() if without_twins else as_written(model, function)

    expected = in_its_own_way(lambda: read_hooks(model, tokens, names, None))
    torch.testing.assert_close(read_hooks(model, tokens, names, None), expected, atol=1e-4, rtol=1e-3)
    for name in sorted(names & expected.keys()):
        fwd_hooks = [(name, lambda activations, hook: activations / 2)]
        logits = in_its_own_way(lambda fwd_hooks=fwd_hooks: model.run_with_hooks(tokens, fwd_hooks=fwd_hooks))
        with hooked(model, (), [(name, halve)]):
            torch.testing.assert_close(model(tokens), logits, atol=1e-3, rtol=1e-3)
