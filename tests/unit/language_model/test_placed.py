"""Models in parts on several devices, and in 8 bits: what is read of them and replaced there, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from fake_mps import fake_mps
from small import N_LAYERS
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_training import cli
from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model import placed
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import bridge_of, load_language_model, model_of
from sae_training.language_model.placed import Placement, is_in_8_bits
from sae_training.language_model.sites import find_hook_site
from sae_training.language_model.twins import switch_in
from sae_training.lm_runner import run_config
from sae_training.run.evals import evaluate
from sae_training.utils import LMSparseAutoencoderSessionloader

IDS = torch.arange(64).view(2, 32)
HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.4.attn.hook_z")


@pytest.fixture(scope="module")
def plain() -> Any:
    """The demo model as transformers has it, loaded in the ordinary way."""
    return load_language_model("demo", lm_dtype="float32", model_processing="none")


def rows(model: Any) -> list[Tensor]:
    return harvest(model, IDS, [find_hook_site(model, hook) for hook in HOOKS])


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=["word", "map", "auto"])
def test_one_device_is_the_ordinary_way(device_map: Any, plain: Any) -> None:
    model = load_language_model("demo", "cpu", "float32", "none", device_map=device_map)
    assert all(torch.equal(a, b) for a, b in zip(rows(model), rows(plain), strict=True))


def test_parts_on_two_devices(plain: Any) -> None:
    # From the CPU to the device and back. Without a stand-in it takes two GPUs.
    near, far = ("model.embed_tokens", "model.rotary_emb", "lm_head"), ("model.norm",)
    parts = dict.fromkeys(near, "cpu") | dict.fromkeys(far, "mps")
    parts |= {f"model.layers.{layer}": "mps" if layer in (2, 3) else "cpu" for layer in range(N_LAYERS)}
    with fake_mps():
        loaded = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
        spread: Any = dispatch_model  # whose annotations are narrower than what it takes
        model = bridge_of(spread(loaded, parts, main_device="cpu"), str(DEMO_MODEL), processed=False)
        assert all(switch_in(block) is not None for block in model.blocks)
        found, logits = rows(model), model(IDS)
    assert {tensor.device.type for tensor in [*found, logits]} == {"cpu"}
    below, *above = zip(found, rows(plain), strict=True)
    assert torch.equal(*below)
    for pair in (*above, (logits, plain(IDS))):  # attention on the device sums in another order
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


def test_autoencoders_beside_their_language_model(
    small_config: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # because the stand-in is that of one thread

    def session(given: Any = None, **fields: Any) -> tuple[Any, Tensor, dict[str, float]]:
        cfg = small_config(architecture="topk", k=4, model_processing="none", **fields)
        model, sae, store = LMSparseAutoencoderSessionloader(cfg).load_session(given)
        return model, store.next_batch(), evaluate(sae, store, store.held_out_tokens())

    _, expected_batch, expected = session(plain)
    with fake_mps():
        model, batch, found = session(device_map="mps")
        assert {parameter.device.type for parameter in model.parameters()} == {"mps"}
    torch.testing.assert_close(batch, expected_batch, atol=1e-4, rtol=1e-4)  # and on the CPU
    assert found == pytest.approx(expected, rel=1e-3)


def test_weights_in_8_bits(plain: Any) -> None:
    model = load_language_model("demo", "cpu", "float32", "none", load_in_8bit=True)
    assert is_in_8_bits(model)
    assert not is_in_8_bits(plain)
    for layer, exact in zip(model.original_model.model.layers, plain.original_model.model.layers, strict=True):
        weight, expected = (part.mlp.down_proj.weight for part in (layer, exact))
        step = expected.abs().amax(dim=1, keepdim=True) / 127  # each row of weights has a scale of its own
        torch.testing.assert_close(weight.float() * step, expected, atol=step.max().item(), rtol=0)
        assert weight.dtype == torch.int8
    for found, expected in zip(rows(model), rows(plain), strict=True):
        assert 0 < (found - expected).norm() / expected.norm() < 0.1


def test_8_bits_are_part_of_a_run_and_of_a_cache(small_config: Any, tmp_path: Path) -> None:
    fields = {"model_processing": "none", "load_in_8bit": True, "n_eval_batches": 0, "architecture": "topk", "k": 4}
    words = ["--hook_point=blocks.1.hook_resid_post", "--context_size=16", "--store_batch_size=4"]
    words += ["--total_training_tokens=512", "--lm_dtype=float32", f"--cached_activations_path={tmp_path / 'cache'}"]
    words += ["--no-exclude_special_tokens", "--model_processing=none", "--load_in_8bit"]
    assert cli.main(["cache", "demo", "demo", *words]) == 0
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path / "cache")}
    cfg = small_config(**fields, **cached, total_training_tokens=128)
    run = run_config(cfg)
    model, sae, _ = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run.folder.path)
    assert is_in_8_bits(model)
    assert sae.cfg.load_in_8bit
    model, *_ = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run.folder.path, load_in_8bit=False)
    assert not is_in_8_bits(model)
    with pytest.raises(ValueError, match="load_in_8bit"):
        run_config(dataclasses.replace(cfg, load_in_8bit=False, run_name="other"))
    with pytest.warns(UserWarning, match="load_in_8bit: found True with a model whose weights are not in 8 bits"):
        model_of(cfg, model)


@pytest.mark.parametrize(("place", "message"), [
    (Placement("cpu", "cuda"), "device_map: found 'cuda', but .* set it to cpu"),
    (Placement("cpu", {"": 3}), "device_map: found 'cuda:3', but "),
    (Placement("cpu", "everywhere"), "device_map: found 'everywhere', expected one of auto"),
], ids=range(3))  # fmt: skip
def test_devices_that_are_not_there(place: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place.check("none")


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"without the package bitsandbytes.*\(pip install bitsandbytes"):
        load_language_model("demo", "cpu", "float32", "none", load_in_8bit=True)


@pytest.mark.parametrize("places", [{"a": 0, "b": "cpu"}, {"a": "cpu", "b": "disk"}, {"": "disk"}], ids=range(3))
def test_a_model_for_which_accelerate_has_no_room(places: dict[str, Any]) -> None:
    model = torch.nn.Module()
    model.hf_device_map = places  # pyright: ignore - as accelerate sets it
    with pytest.raises(ValueError, match="found 'auto' with a model that does not fit: accelerate left .* 0 more"):
        Placement("cpu", "auto").check_in_reach(model)
