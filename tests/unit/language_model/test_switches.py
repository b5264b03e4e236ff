"""Hook points that TransformerLens computes only with a switch: they are read and replaced as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import D_IN, VOCAB
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import hooked_transformer_class, load_language_model
from sae_training.language_model.sites import find_hook_site, find_sites
from sae_training.language_model.switches import SWITCHES
from sae_training.lm_runner import language_model_sae_runner
from sae_training.utils import LMSparseAutoencoderSessionloader

D_MODEL, N_HEADS, N_IDS = 16, 2, VOCAB
IDS = torch.arange(1, 9).reshape(1, 8)


def small_model(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if kind == "HookedTransformer":
        HookedTransformer = hooked_transformer_class()
        if HookedTransformer is None:
            pytest.skip("this TransformerLens has no HookedTransformer")
        from transformer_lens import HookedTransformerConfig

        sizes = {"n_layers": 2, "d_model": D_MODEL, "n_heads": N_HEADS, "d_head": 8, "n_ctx": 32, "d_vocab": 50}
        return HookedTransformer(HookedTransformerConfig(**sizes, d_mlp=20, act_fn="gelu", seed=0))  # pyright: ignore
    sizes: dict[str, Any] = {"hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": N_HEADS}
    sizes |= {"intermediate_size": 32, "num_key_value_heads": 1 if kind == "llama" else 2}
    if kind == "gpt2":
        sizes = {"n_embd": D_MODEL, "n_layer": 2, "n_head": N_HEADS, "n_positions": 32}
    config = AutoConfig.for_model(kind, **sizes, vocab_size=N_IDS, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return load_language_model(str(folder), lm_dtype="float32")


KINDS = ["HookedTransformer", "gpt2", "llama", "gpt_neox"]


def read(model: Any, hook: str) -> torch.Tensor:
    return harvest(model, IDS, [find_hook_site(model, hook)])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", SWITCHES)
def test_hook_with_a_switch_is_read_and_replaced(kind: str, hook: str, tmp_path: Path) -> None:
    model = small_model(kind, tmp_path)
    before = model(IDS)
    name = f"blocks.1.attn.{hook}" if hook == "hook_result" else f"blocks.1.{hook}"
    assert not getattr(model.cfg, SWITCHES[hook])
    site = find_hook_site(model, name)
    n_heads = 1 if kind == "llama" and hook in ("hook_k_input", "hook_v_input") else N_HEADS
    assert site.d_in == (D_MODEL if hook == "hook_mlp_in" else D_MODEL * n_heads)
    (activations,) = harvest(model, IDS, [site])
    assert activations.shape == (1, 8, site.d_in)
    assert activations.abs().max() > 0
    torch.testing.assert_close(model(IDS), before, atol=1e-4, rtol=1e-4)  # the switch changes roundings alone
    replaced = model.run_with_hooks(IDS, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))])
    assert (replaced - before).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_hooks_mean(kind: str, tmp_path: Path) -> None:
    model = small_model(kind, tmp_path)
    result = read(model, "blocks.1.attn.hook_result").unflatten(-1, (N_HEADS, D_MODEL)).sum(2)
    attn_out = read(model, "blocks.1.hook_attn_out")
    constant = attn_out - result  # the bias of the output projection
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), atol=1e-4, rtol=1e-4)
    if kind != "gpt_neox":  # its MLP reads beside the attention, not after it
        torch.testing.assert_close(read(model, "blocks.1.hook_mlp_in"), read(model, "blocks.1.hook_resid_mid"))


def test_hooks_that_exclude_each_other_are_refused_with_both_names(tmp_path: Path) -> None:
    model = small_model("gpt2", tmp_path)
    find_hook_site(model, "blocks.0.hook_q_input")
    with pytest.raises(ValueError, match=r"hook_point: found blocks.0.hook_attn_in, but .* hook_q_input, .* already"):
        find_hook_site(model, "blocks.0.hook_attn_in")


def test_switch_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    sizes = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "n_ctx": 8, "d_vocab": 9, "d_mlp": 8}
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", n_key_value_heads=1))  # pyright: ignore
    with pytest.raises(ValueError, match="hook_attn_in needs use_attn_in, which this model cannot"):
        find_hook_site(model, "blocks.0.hook_attn_in")


def test_other_hooks_turn_nothing_on(demo_model: Any) -> None:
    find_sites(LanguageModelSAERunnerConfig(hook_point="blocks.1.hook_resid_post", d_in=D_IN), demo_model)
    assert not any(getattr(demo_model.cfg, switch, False) for switch in SWITCHES.values())


@pytest.mark.parametrize(
    "hooks",
    [
        {"hook_point": "blocks.1.attn.hook_result", "hook_point_head_index": 1},
        {"hook_point": "blocks.1.hook_mlp_in"},
        {"hook_point": "blocks.1.hook_v_input", "hook_point_head_index": 0},
        {"hook_point": "blocks.1.hook_mlp_in", "target_hook_point": "blocks.1.hook_mlp_out"},
    ],
    ids=lambda hooks: hooks["hook_point"],
)
def test_a_run_on_such_a_hook_trains_evaluates_and_loads(hooks: dict[str, Any], small_config: Any) -> None:
    cfg = small_config(**hooks, d_in=None)
    language_model_sae_runner(cfg)
    folder = Path(cfg.run_dir) / "run"
    assert '"metrics/CE_loss_score"' in (folder / "final" / "evaluation.json").read_text()
    _, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(folder)
    assert store.get_activations(store.get_batch_tokens()).shape[-1] == sae.d_in
