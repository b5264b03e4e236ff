from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import VOCAB
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model.harvest import at_site, harvest, put_back
from sae_training.language_model.load import hooked_transformer_class, language_model_dtype, load_language_model
from sae_training.language_model.sites import find_hook_site


@pytest.fixture(scope="module", params=["HookedTransformer", "TransformerBridge"])
def small_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model of each class of TransformerLens, as a user would pass one in."""
    if request.param == "TransformerBridge":
        folder = tmp_path_factory.mktemp("small")
        config = GPT2Config(
            n_layer=2, n_embd=16, n_head=2, n_positions=32, n_inner=20, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0
        )
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
        return load_language_model(str(folder), lm_dtype="float32")
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, n_heads=2, d_head=8, n_ctx=32, d_vocab=50, act_fn="gelu", seed=0, d_mlp=20
    )
    return HookedTransformer(cfg)


def tokens(n: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (2, n), generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- loading


def test_demo_model_gives_the_logits_of_the_plain_transformers_model(demo_model: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    ids = tokens(20, demo_model.cfg.d_vocab)
    with torch.inference_mode():
        ours, theirs = demo_model(ids).log_softmax(-1), plain(ids).logits.log_softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_rotary_frequencies_keep_the_precision_that_transformers_gives_them() -> None:
    expected = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).model.rotary_emb.inv_freq
    buffers = load_language_model("demo", lm_dtype="bfloat16").named_buffers()
    found = [buffer for name, buffer in buffers if name.endswith(".inv_freq")]
    assert found and all(torch.equal(buffer, expected) and buffer.dtype == torch.float32 for buffer in found)


def test_bfloat16_model_stays_close_to_float32(demo_model: Any) -> None:
    half = load_language_model("demo", lm_dtype="bfloat16")
    site, ids = find_hook_site(half, "blocks.2.hook_resid_post"), tokens(20, half.cfg.d_vocab)
    (narrow,), (full,) = harvest(half, ids, [site]), harvest(demo_model, ids, [site])
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - full).norm() / full.norm() < 0.02


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache in which "gpt2" is a tiny random GPT-2, as if it had been downloaded."""
    cache = tmp_path_factory.mktemp("hub")
    snapshot = cache / "hub" / "models--gpt2" / "snapshots" / "abc"
    torch.manual_seed(0)
    # n_ctx as in the published config.json, where HookedTransformer looks for it.
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=32, n_ctx=32, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(snapshot)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(snapshot)
    refs = cache / "hub" / "models--gpt2" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    return cache


LOAD_BY_NAME = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model, load_tokenizer
from sae_training.language_model.sites import find_hook_site
ids = torch.arange(1, 11).unsqueeze(0)
named = load_language_model("GPT2-small", lm_dtype="float32")
folder = load_language_model(sys.argv[1], lm_dtype="float32")
site = find_hook_site(named, "blocks.1.hook_resid_pre")
(a,), (b,) = harvest(named, ids, [site]), harvest(folder, ids, [find_hook_site(folder, site.name)])
same = (a - b).abs().max().item()
plain = load_language_model("gpt2", lm_dtype="float32", model_processing="none")
with torch.inference_mode():
    hidden = AutoModelForCausalLM.from_pretrained("gpt2")(ids, output_hidden_states=True).hidden_states[1]
as_it_is = (harvest(plain, ids, [find_hook_site(plain, site.name)])[0] - hidden).abs().max().item()
centred = (a - hidden + hidden.mean(-1, keepdim=True)).abs().max().item()
place = "blocks.1.mlp.hook_in"
bridge = load_language_model("gpt2", lm_dtype="float32", model_processing="none", hook_points=[place])
hf, seen = AutoModelForCausalLM.from_pretrained("gpt2"), []
hf.transformer.h[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
with torch.inference_mode():
    hf(ids)
at_module = (harvest(bridge, ids, [find_hook_site(bridge, place)])[0] - seen[0]).abs().max().item()
tokenizers = [load_tokenizer(name).get_vocab() for name in ("GPT2-small", "gpt2", sys.argv[1])]
types = [type(model).__name__ for model in (named, folder, plain)]
print(json.dumps([*types, same, as_it_is, centred, at_module, tokenizers[0] == tokenizers[1] == tokenizers[2]]))
"""


def test_listed_name_and_folder_give_equal_activations_and_tokenizers(hub_cache: Path) -> None:
    snapshot = hub_cache / "hub" / "models--gpt2" / "snapshots" / "abc"
    done = subprocess.run(
        [sys.executable, "-c", LOAD_BY_NAME, str(snapshot)],
        env=os.environ | {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    named, folder, plain, *differences, same_tokenizer = json.loads(done.stdout.splitlines()[-1])
    assert named == plain == ("TransformerBridge" if hooked_transformer_class() is None else "HookedTransformer")
    assert folder == "TransformerBridge"
    assert max(differences) < 1e-5
    assert same_tokenizer


@pytest.mark.parametrize("name", ["no-such/model-anywhere", "gpt2-medium"])
def test_unreachable_model_says_what_can_be_given(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"model_name: could not load '{name}'.*local folder"):
        load_language_model(name)


def test_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_language_model(str(tmp_path))


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=32, vocab_size=100, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{VOCAB - 1}, but the model knows only 100 tokens"):
        load_language_model(str(tmp_path))


def test_named_precision_is_used_and_auto_chooses_one() -> None:
    assert language_model_dtype("float32", "cpu") == torch.float32
    assert language_model_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize(
    ("hook", "head", "width"),
    [
        ("blocks.1.hook_resid_post", None, 16),
        ("blocks.1.hook_resid_pre", None, 16),
        ("blocks.0.hook_resid_pre", None, 16),
        ("blocks.0.mlp.hook_post", None, 20),
        ("blocks.1.attn.hook_z", None, 16),
        ("blocks.1.attn.hook_z", 0, 8),
        ("blocks.1.attn.hook_q", 1, 8),
        ("hook_embed", None, 16),
        ("ln_final.hook_normalized", None, 16),
    ],
)
def test_harvest_equals_the_cached_activations(small_model: Any, hook: str, head: int | None, width: int) -> None:
    site = find_hook_site(small_model, hook, head)
    ids = tokens(7, 50)
    (rows,) = harvest(small_model, ids, [site])
    assert rows.shape == (2, 7, width) == (2, 7, site.d_in)
    _, cache = small_model.run_with_cache(ids)
    whole = cache[hook]
    expected = whole if whole.ndim == 3 else whole[:, :, head] if head is not None else whole.flatten(2)
    torch.testing.assert_close(rows, expected)


def test_residual_before_a_block_is_read_without_running_the_block(small_model: Any) -> None:
    site = find_hook_site(small_model, "blocks.1.hook_resid_pre")
    assert (site.read_name, site.stop_at_layer) == ("blocks.0.hook_resid_post", 1)


def test_put_back_changes_only_what_at_site_reads(small_model: Any) -> None:
    site = find_hook_site(small_model, "blocks.0.attn.hook_z", 1)
    whole = torch.randn(2, 3, 2, 8)
    changed = put_back(whole, torch.zeros(2, 3, 8), site)
    assert not at_site(changed, site).any()
    assert torch.equal(changed[:, :, 0], whole[:, :, 0])
    assert whole[:, :, 1].any()


def test_unknown_hook_lists_the_models_hooks_and_the_nearest(small_model: Any) -> None:
    listed = (
        r"Did you mean blocks\.1\.hook_resid_post\?\nIts hooks, for layer 0 to 1: .*blocks\.\{layer\}\.hook_resid_pre"
    )
    with pytest.raises(ValueError, match=listed):
        find_hook_site(small_model, "blocks.1.hook_resid_pots")


def test_block_beyond_the_last_gives_their_number(small_model: Any) -> None:
    with pytest.raises(ValueError, match=r"names block 5, but this model has 2; choose a layer from 0 to 1"):
        find_hook_site(small_model, "blocks.5.hook_resid_pre")


def test_hook_without_one_vector_a_position_is_refused(small_model: Any) -> None:
    with pytest.raises(ValueError, match="expected \\(prompts, positions, width\\)"):
        find_hook_site(small_model, "blocks.0.attn.hook_pattern")


@pytest.mark.parametrize(
    ("hook", "head", "d_in", "message"),
    [
        ("blocks.0.hook_resid_pre", None, 99, "got 99, but blocks.0.hook_resid_pre of this model is 16 wide"),
        ("blocks.0.attn.hook_z", 2, None, "has 2 heads; use 0 to 1"),
        ("blocks.0.hook_resid_pre", 0, None, "has no head axis"),
    ],
)
def test_wrong_width_or_head_names_both_values(small_model: Any, hook: str, head: Any, d_in: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_hook_site(small_model, hook, head, d_in)


def test_errors_about_a_target_name_the_fields_of_the_target(small_model: Any) -> None:
    target = {"field": "target_hook_point", "width_field": "d_out"}
    with pytest.raises(ValueError, match=r"^target_hook_point: this model has no hook 'blocks\.1\.hook_nothing'"):
        find_hook_site(small_model, "blocks.1.hook_nothing", **target)
    with pytest.raises(ValueError, match=r"^target_hook_point: .*attn\.hook_pattern has shape"):
        find_hook_site(small_model, "blocks.0.attn.hook_pattern", **target)
    with pytest.raises(ValueError, match=r"^d_out: got 99, but .* 16 wide; use d_out=16, or d_out=None"):
        find_hook_site(small_model, "blocks.0.hook_mlp_out", d_in=99, **target)


def test_no_weight_of_a_narrow_model_is_held_twice() -> None:
    model = load_language_model("demo", lm_dtype="bfloat16")
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    others = [
        (name, key)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in held
    ]
    assert others == []
    W_in: Any = model.blocks[1].mlp.W_in
    assert W_in.dtype == torch.bfloat16
