"""The logit lens against the weights of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from small import VOCAB
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from sae_analysis.logit_lens import logit_lens
from sae_analysis.of_model import of_model
from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model.load import hooked_transformer_class, load_language_model
from sae_training.language_model.sites import find_hook_site
from sae_training.language_model.unembedding import neurons, tensors_of, to_logits, unembedding


def test_directions_reach_the_logits_as_in_the_model(demo_model: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    weight, head = plain.model.norm.weight.detach(), plain.lm_head.weight.detach()
    directions = torch.randn(5, len(weight), generator=torch.Generator().manual_seed(0))
    expected = (directions.double() * weight.double()) @ head.double().T
    expected -= expected.mean(dim=1, keepdim=True)
    found = logit_lens(directions, unembedding(tensors_of(demo_model, [])), 4)
    np.testing.assert_allclose(found.top_values, expected.topk(4).values, rtol=1e-4)
    assert found.top.tolist() == expected.topk(4).indices.tolist()
    assert found.bottom.tolist() == expected.topk(4, largest=False).indices.tolist()
    np.testing.assert_allclose(found.skew, stats.skew(expected, axis=1), rtol=1e-3)
    np.testing.assert_allclose(found.kurtosis, stats.kurtosis(expected, axis=1, fisher=False), rtol=1e-3)
    for latent in range(5):
        low, high = found.edges[latent]
        assert found.counts[latent].sum() == len(head)
        expected_counts = np.histogram(expected[latent].numpy(), np.linspace(low, high, 41))[0]
        assert abs(found.counts[latent] - expected_counts).sum() <= 4  # at the edges float32 decides


@pytest.mark.parametrize("processing", ["default", "none"])
def test_layer_norm_is_centred_and_its_weight_counts_once(tmp_path: Any, processing: str) -> None:
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, vocab_size=50))
    with torch.no_grad():
        plain.transformer.ln_f.weight.uniform_(0.5, 2)
    plain.save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path), lm_dtype="float32", model_processing=processing)
    direction = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    centred = direction - direction.mean(dim=1, keepdim=True)
    expected = (centred * plain.transformer.ln_f.weight) @ plain.lm_head.weight.T
    found = direction @ unembedding(tensors_of(model, []))
    # Processing subtracts the mean over the vocabulary from the unembedding, which changes no probability.
    torch.testing.assert_close(
        found - found.mean(1, True), (expected - expected.mean(1, True)).detach(), atol=1e-4, rtol=1e-4
    )


def test_a_direction_of_zeros_has_no_shape() -> None:
    found = logit_lens(torch.zeros(1, 4), torch.randn(4, 30), 3)
    assert np.isnan(found.skew).all() and np.isnan(found.kurtosis).all()
    assert found.counts.sum() == 30


@pytest.mark.parametrize(
    ("hook", "has_logits", "has_neurons"),
    [
        ("blocks.1.hook_resid_post", True, True),
        ("blocks.1.hook_mlp_out", True, True),
        ("blocks.1.mlp.hook_post", True, True),
        ("blocks.1.attn.hook_z", True, False),
        ("blocks.1.attn.hook_q", False, False),
    ],
)
def test_what_a_place_writes_to_the_stream(demo_model: Any, hook: str, has_logits: bool, has_neurons: bool) -> None:
    site = find_hook_site(demo_model, hook)
    found = of_model(demo_model, site)
    for part, is_there in ((found.unembedding, has_logits), (found.neurons, has_neurons)):
        assert (part is not None) == is_there
    if found.unembedding is not None:
        assert found.unembedding.shape == (site.d_in, demo_model.cfg.d_vocab)
    if found.neurons is not None:
        assert found.neurons.shape[1] == site.d_in


@pytest.mark.parametrize("model_processing", ["none", "default"])
def test_a_norm_that_multiplies_by_one_more_than_its_weight(model_processing: str, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    gemma = GemmaForCausalLM(config)
    with torch.no_grad():
        gemma.model.norm.weight.uniform_(-0.5, 1)
    gemma.save_pretrained(tmp_path)
    expected = ((1 + gemma.model.norm.weight).unsqueeze(1) * gemma.lm_head.weight.T).detach()
    found = unembedding(tensors_of(load_language_model(str(tmp_path), "cpu", "float32", model_processing), []))
    centred = [table - table.mean(dim=1, keepdim=True) for table in (found, expected)]
    torch.testing.assert_close(*centred, rtol=1e-4, atol=1e-5)


def test_a_model_without_neurons_or_unembedding_has_none() -> None:
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_vocab=9, attn_only=True, normalization_type=None
    )
    model = HookedTransformer(cfg)
    site = find_hook_site(model, "blocks.0.hook_resid_post")
    tensors = tensors_of(model, [site])
    assert sorted(tensors) == ["head", "is_centred"]
    assert neurons(tensors, site) is None
    torch.testing.assert_close(to_logits(tensors, site), model.W_U)
    del model.unembed.W_U
    assert to_logits(tensors_of(model, [site]), site) is None
