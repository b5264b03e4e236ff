"""Transcoders in whole runs, and runs on normalised activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import D_IN, D_SAE
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_training.activations_store import ActivationsStore
from sae_training.demo_data import DEMO_MODEL
from sae_training.lm_runner import run_config
from sae_training.run.evals import evaluate
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.utils import LMSparseAutoencoderSessionloader

HOOKS = {"hook_point": "blocks.1.hook_resid_mid", "target_hook_point": "blocks.1.hook_mlp_out"}


def cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """Mean of -log p(next token)."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(end_dim=1), tokens[:, 1:].flatten()).item()


def test_rows_of_both_hooks_belong_together(small_config: Callable, demo_model: Any) -> None:
    """resid_post = resid_mid + mlp_out, for each row of a shuffled batch."""
    hooks = {"hook_point": "blocks.1.hook_mlp_out", "target_hook_point": "blocks.1.hook_resid_post"}
    store = ActivationsStore(small_config(**hooks), demo_model)
    mid = ActivationsStore(small_config(hook_point="blocks.1.hook_resid_mid"), demo_model)
    for _ in range(4):
        store.advance()
        batch = store.batch(store.sites)
        torch.testing.assert_close(batch.x + mid.next_batch(), batch.target, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_evaluation_puts_the_output_in_the_place_of_the_target(small_config: Callable, demo_model: Any) -> None:
    store = ActivationsStore(small_config(**HOOKS, d_out=D_IN, skip_connection=True), demo_model)
    sae = SparseAutoencoder(store.cfg).eval()
    sae.W_skip.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    tokens = store.held_out_tokens()[:4]
    found = evaluate(sae, store, tokens)

    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    block, seen = plain.model.layers[1], {}
    block.post_attention_layernorm.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    clean = plain(tokens).logits.double()
    handle = block.mlp.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    plain(tokens)
    handle.remove()
    block.mlp.register_forward_hook(lambda module, inputs, output: sae.reconstruct(seen["x"]))
    changed = plain(tokens).logits.double()
    assert found["metrics/ce_loss_without_sae"] == pytest.approx(cross_entropy(clean, tokens), rel=1e-4)
    assert found["metrics/ce_loss_with_sae"] == pytest.approx(cross_entropy(changed, tokens), rel=1e-4)
    y = seen["y"].flatten(end_dim=1)
    error = sae.reconstruct(seen["x"]).flatten(end_dim=1) - y
    explained = 1 - error.pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert found["metrics/eval_explained_variance"] == pytest.approx(explained.item(), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, HOOKS | {"skip_connection": True}], ids=["autoencoder", "transcoder"])
def test_normalised_training_leaves_weights_for_raw_activations(
    changes: dict, small_config: Callable, demo_model: Any
) -> None:
    cfg = small_config(**changes, normalize_activations="expected_average_only_in", architecture="topk", k=8, lr=1e-3)
    run = run_config(cfg, demo_model)
    (member,) = run.members
    scales = member.scales
    assert all(scale != 1 for scale in scales)
    served = run.store.sample(256)
    for rows, site in ((served.x, member.sites.input), (served.target, member.sites.target)):
        assert rows.norm(dim=1).mean().item() == pytest.approx(site.d_in**0.5, rel=0.2)
    expected = member.trainer.sae.reconstruct(served.x) / scales[-1]
    loaded = SparseAutoencoder.load_from_pretrained(run.folder.path)
    torch.testing.assert_close(loaded.reconstruct(served.x / scales[0]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(D_SAE))
    tuned = run_config(replace(cfg, run_name="tuned", from_pretrained_path=str(run.folder.path), lr=1e-12), demo_model)
    for (name, weight), (_, first) in zip(tuned.sae.weights(), loaded.weights(), strict=True):
        torch.testing.assert_close(weight, first, rtol=1e-3, atol=1e-3, msg=name)


def test_checkpoint_of_a_normalised_run_takes_raw_activations(small_config: Callable, demo_model: Any) -> None:
    cfg = small_config(normalize_activations="expected_average_only_in", checkpoint_every_steps=12)
    run = run_config(cfg, demo_model)
    loaded = SparseAutoencoder.load_from_pretrained(run.folder.path / "checkpoints" / "step_12")
    assert loaded.cfg.normalize_activations == "none"
    for (name, weight), (_, expected) in zip(loaded.weights(), run.sae.weights(), strict=True):
        assert torch.equal(weight, expected), name
    assert not torch.equal(loaded.b_dec, run.members[0].trainer.sae.b_dec)


def test_fine_tuning_an_autoencoder_as_a_transcoder_is_refused(small_config: Callable, demo_model: Any) -> None:
    first = run_config(small_config(), demo_model).folder.path
    with pytest.raises(ValueError, match="it holds an autoencoder, expected a transcoder"):
        run_config(small_config(**HOOKS, run_name="tuned", from_pretrained_path=str(first)), demo_model)


def test_a_run_trains_resumes_and_comes_back(small_config: Callable, demo_model: Any) -> None:
    cfg = small_config(
        **HOOKS, d_in=None, skip_connection=True, architecture="topk", k=16, lr=2e-3, total_training_tokens=12_800
    )
    run = run_config(cfg, demo_model)
    evaluation = evaluate(run.sae, run.store, run.held_out)
    assert evaluation["metrics/eval_explained_variance"] > 0.2
    assert evaluation["metrics/ce_loss_with_sae"] < evaluation["metrics/ce_loss_with_ablation"]
    assert run.sae.get_name() == f"transcoder_demo_blocks.1.hook_resid_mid_blocks.1.hook_mlp_out_{D_SAE}"
    _, sae, store = LMSparseAutoencoderSessionloader.load_session_from_pretrained(run.folder.path, model=demo_model)
    store.advance()
    batch = store.batch(store.sites)
    assert sae.is_transcoder and torch.equal(sae.reconstruct(batch.x), run.sae.reconstruct(batch.x))
    assert sae(batch.x, target=batch.target).mse_loss < batch.target.var()


def test_a_transcoder_run_says_which_hook_or_width_is_wrong(small_config: Callable, demo_model: Any) -> None:
    swapped = {"hook_point": HOOKS["target_hook_point"], "target_hook_point": HOOKS["hook_point"]}
    with pytest.raises(ValueError, match="target_hook_point: the model computes .*resid_mid before .*mlp_out"):
        ActivationsStore(small_config(**swapped), demo_model)
    with pytest.raises(ValueError, match="target_hook_point: this model has no hook 'blocks.1.hook_mlp_uot'"):
        run_config(small_config(**HOOKS | {"target_hook_point": "blocks.1.hook_mlp_uot"}), demo_model)
    with pytest.raises(ValueError, match=f"d_out: got 300, but .* {D_IN} wide; use d_out={D_IN}, or d_out=None"):
        run_config(small_config(**HOOKS, d_out=300), demo_model)
