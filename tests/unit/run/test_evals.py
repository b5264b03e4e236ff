from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import D_HEAD, D_IN, D_SAE, text_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_training.activations_store import ActivationsStore
from sae_training.demo_data import DEMO_HELD_OUT_TEXT, DEMO_MODEL
from sae_training.language_model.harvest import harvest
from sae_training.run import evals
from sae_training.run.eval_sums import compare_predictions, pattern_kl_sum
from sae_training.run.evals import evaluate
from sae_training.sparse_autoencoder import SparseAutoencoder

LAYER = 1
Make = Callable[..., ActivationsStore]


@pytest.fixture
def make_store(small_config: Callable, demo_model: Any) -> Make:
    def make(**changes: Any) -> ActivationsStore:
        return ActivationsStore(small_config(**changes), demo_model)

    return make


@pytest.fixture(scope="module")
def tokens(demo_model: Any) -> Tensor:
    """4 contexts of 16 tokens, BOS first, as the store makes them."""
    text = text_of(DEMO_HELD_OUT_TEXT)[:2000]
    ids = demo_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = torch.full((4, 1), demo_model.tokenizer.bos_token_id)
    return torch.cat([bos, torch.tensor(ids[:60]).reshape(4, 15)], dim=1)


@torch.no_grad()
def autoencoder(store: ActivationsStore, kind: str) -> SparseAutoencoder:
    """An autoencoder for the store's activations: "perfect", "zero" or, as initialised, "random"."""
    sae = SparseAutoencoder(store.cfg)
    identity = torch.eye(sae.d_in)
    match kind:
        case "perfect":  # x = relu(x) - relu(-x)
            sae.W_enc.copy_(torch.cat([identity, -identity], dim=1))
            sae.W_dec.copy_(torch.cat([identity, -identity], dim=0))
        case "zero":
            sae.W_dec.zero_()
    return sae


# ------------------------------------------------------------------------------------------------ plain transformers


@pytest.fixture(scope="module")
def plain_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def plain_logits(model: Any, tokens: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Logits of the model without any of this package, with `change` made to the output of block LAYER."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return change(output) if change else output

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        return model(tokens).logits.double()
    finally:
        handle.remove()


def plain_cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """Mean of -log p(next token), token by token."""
    p = logits.softmax(dim=-1)
    terms = [
        -math.log(p[prompt, place, tokens[prompt, place + 1]].item())
        for prompt in range(tokens.shape[0])
        for place in range(tokens.shape[1] - 1)
    ]
    return sum(terms) / len(terms)


def plain_kl(clean: Tensor, changed: Tensor) -> float:
    p, q = clean[:, :-1].softmax(dim=-1), changed[:, :-1].softmax(dim=-1)
    return (p * (p / q).log()).sum(dim=-1).mean().item()


def test_losses_are_those_of_plain_transformers(make_store: Make, tokens: Tensor, plain_model: Any) -> None:
    store = make_store()
    sae = autoencoder(store, "random")
    found = evaluate(sae, store, tokens)
    clean = plain_logits(plain_model, tokens)
    with_sae = plain_logits(plain_model, tokens, lambda x: sae(x).sae_out)
    ablated = plain_logits(plain_model, tokens, torch.zeros_like)
    losses = [plain_cross_entropy(logits, tokens) for logits in (clean, with_sae, ablated)]
    expected = {
        "metrics/ce_loss_without_sae": losses[0],
        "metrics/ce_loss_with_sae": losses[1],
        "metrics/ce_loss_with_ablation": losses[2],
        "metrics/CE_loss_score": (losses[2] - losses[1]) / (losses[2] - losses[0]),
        "metrics/kl_with_sae": plain_kl(clean, with_sae),
        "metrics/kl_with_ablation": plain_kl(clean, ablated),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_excluded_positions_keep_their_clean_activations(make_store: Make, tokens: Tensor, plain_model: Any) -> None:
    store = make_store(exclude_special_tokens=True)
    sae = autoencoder(store, "random")
    found = evaluate(sae, store, tokens)
    is_bos = (tokens == store.model.tokenizer.bos_token_id).unsqueeze(-1)
    assert is_bos.any()
    with_sae = plain_logits(plain_model, tokens, lambda x: torch.where(is_bos, x, sae(x).sae_out))
    ablated = plain_logits(plain_model, tokens, lambda x: torch.where(is_bos, x, torch.zeros_like(x)))
    assert found["metrics/ce_loss_with_sae"] == pytest.approx(plain_cross_entropy(with_sae, tokens), rel=1e-4)
    assert found["metrics/ce_loss_with_ablation"] == pytest.approx(plain_cross_entropy(ablated, tokens), rel=1e-4)


# ------------------------------------------------------------------------------------------------------- known answers


def test_perfect_autoencoder_changes_nothing(make_store: Make, tokens: Tensor) -> None:
    store = make_store()
    found = evaluate(autoencoder(store, "perfect"), store, tokens)
    assert found["metrics/CE_loss_score"] == pytest.approx(1, abs=1e-6)
    assert found["metrics/ce_loss_with_sae"] == pytest.approx(found["metrics/ce_loss_without_sae"], abs=1e-6)
    assert found["metrics/kl_with_sae"] == pytest.approx(0, abs=1e-6)
    assert found["metrics/eval_explained_variance"] == pytest.approx(1, abs=1e-9)
    assert found["metrics/l2_ratio"] == pytest.approx(1, abs=1e-6)
    assert found["metrics/eval_l0"] == D_IN  # of x and -x in each of the coordinates, one is positive


def test_zero_autoencoder_is_the_ablation(make_store: Make, tokens: Tensor) -> None:
    store = make_store()
    found = evaluate(autoencoder(store, "zero"), store, tokens)
    assert found["metrics/CE_loss_score"] == 0
    assert found["metrics/ce_loss_with_sae"] == found["metrics/ce_loss_with_ablation"]
    assert found["metrics/kl_with_sae"] == found["metrics/kl_with_ablation"] > 0
    assert found["metrics/l2_norm"] == found["metrics/l2_ratio"] == 0


@pytest.mark.parametrize("exclude", [False, True])
def test_figures_of_rows_are_those_of_numpy(make_store: Make, tokens: Tensor, exclude: bool) -> None:
    store = make_store(exclude_special_tokens=exclude)
    sae = autoencoder(store, "random")
    found = evaluate(sae, store, tokens)
    rows = harvest(store.model, tokens, store.sites.all)[0][store.keeps(tokens)]
    assert len(rows) < tokens.numel() if exclude else len(rows) == tokens.numel()
    x = rows.double().numpy()
    out = sae(rows.clone())
    x_hat, active = out.sae_out.detach().double().numpy(), out.feature_acts.detach().numpy() > 0
    norms, norms_hat = (x**2).sum(axis=1) ** 0.5, (x_hat**2).sum(axis=1) ** 0.5
    expected = {
        "metrics/eval_explained_variance": 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum(),
        "metrics/eval_l0": active.sum(axis=1).mean(),
        "metrics/l2_norm": norms_hat.mean(),
        "metrics/l2_ratio": (norms_hat / norms).mean(),
        "metrics/eval_dead_fraction": (~active.any(axis=0)).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)  # a latent at 0 may flip


def test_dead_fraction_counts_latents_that_never_fire(make_store: Make, tokens: Tensor) -> None:
    store = make_store()
    sae = autoencoder(store, "perfect")
    with torch.no_grad():
        sae.b_enc[:128] = -1e6
    # Its latents are the coordinates of x, then those of -x; some have one sign on all of these tokens.
    x = store.get_activations(tokens).flatten(end_dim=1)
    fires = torch.cat([(x > 0).any(dim=0), (x < 0).any(dim=0)])
    fires[:128] = False
    assert evaluate(sae, store, tokens)["metrics/eval_dead_fraction"] == (~fires).sum().item() / D_SAE


# ---------------------------------------------------------------------------------------------------------- the sums


def test_compare_predictions_by_hand() -> None:
    # Tokens 0, 1, 0. Clean: position 0 gives token 1 the odds 3 : 1, position 1 gives token 0 the odds 1 : 1. Changed:
    # odds 1 : 1 in both. Position 2 predicts no token that we hold.
    clean = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [5.0, 0.0]]])
    changed = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 9.0]]])
    ce_clean, ce_changed, kl = compare_predictions(clean, changed, torch.tensor([[0, 1, 0]]))
    assert ce_clean == pytest.approx(math.log(4 / 3) + math.log(2))
    assert ce_changed == pytest.approx(2 * math.log(2))
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_compare_predictions_sums_over_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, changed = torch.randn(2, 3, 4, 7, generator=generator)
    tokens = torch.randint(7, (3, 4), generator=generator)
    each = [compare_predictions(clean[i : i + 1], changed[i : i + 1], tokens[i : i + 1]) for i in range(3)]
    assert compare_predictions(clean, changed, tokens) == pytest.approx([sum(part) for part in zip(*each, strict=True)])


def test_pattern_kl_sum_is_in_bits_and_skips_masked_keys() -> None:
    # Query 0 sees one key: 0 bits. Query 1: (1, 0) against (1/4, 3/4): log2(4) = 2 bits.
    clean = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    changed = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    both = torch.ones(1, 2, dtype=torch.bool)
    assert pattern_kl_sum(clean, changed, both) == pytest.approx(2)
    assert pattern_kl_sum(clean, changed, torch.tensor([[True, False]])) == 0, "query 1 is padding"


# ------------------------------------------------------------------------------------------------------ leaves no trace


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_neither_weights_nor_mode(make_store: Make, tokens: Tensor, training: bool) -> None:
    store = make_store()
    sae = autoencoder(store, "random").train(training)
    weights = {name: weight.clone() for name, weight in sae.weights()}
    evaluate(sae, store, tokens)
    assert sae.training is training
    assert all(torch.equal(weights[name], weight) for name, weight in sae.weights())
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_evaluation_changes_neither_the_next_batches_nor_the_generator(make_store: Make, tokens: Tensor) -> None:
    store, untouched = make_store(), make_store()
    for each in (store, untouched):
        each.next_batch()
    generator = torch.get_rng_state()
    evaluate(autoencoder(store, "random"), store, tokens)
    assert torch.equal(torch.get_rng_state(), generator)
    for _ in range(4):
        assert torch.equal(store.next_batch(), untouched.next_batch())


def test_evaluation_leaves_no_hooks_on_the_language_model(make_store: Make, tokens: Tensor) -> None:
    store = make_store()
    before = store.model(tokens)
    evaluate(autoencoder(store, "zero"), store, tokens)
    assert torch.equal(store.model(tokens), before)


@pytest.mark.parametrize("exclude", [False, True])
def test_prompts_a_pass_do_not_change_the_figures(
    make_store: Make, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, exclude: bool
) -> None:
    store = make_store(exclude_special_tokens=exclude)
    sae = autoencoder(store, "random")
    at_once = evaluate(sae, store, tokens)
    passes = []
    for n_prompts in (1, 3):  # 4 prompts: 1 + 1 + 1 + 1, 3 + 1
        monkeypatch.setattr(evals, "MAX_LOGITS", n_prompts * 16 * store.model.cfg.d_vocab)
        passes.append(len(tokens.split(evals.prompts_of_a_pass(16, store.model, sae.d_sae))))
        assert evaluate(sae, store, tokens) == pytest.approx(at_once, rel=1e-3)  # a latent at 0 may flip
    assert passes == [4, 2]


def test_a_wide_code_bounds_the_prompts_of_a_pass(make_store: Make) -> None:
    model = make_store().model
    few, many = (evals.prompts_of_a_pass(128, model, d_sae) for d_sae in (2**20, 0))
    assert (few, many) == (2**26 // 2**27 or 1, 2**26 // (128 * model.cfg.d_vocab))
    assert evals.prompts_of_a_pass(128, model, 2**17) == 4


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("head", [0, 3])
def test_attention_of_a_query_hook(make_store: Make, tokens: Tensor, plain_model: Any, head: int) -> None:
    store = make_store(hook_point=f"blocks.{LAYER}.attn.hook_q", hook_point_head_index=head, d_in=D_HEAD)
    found = evaluate(autoencoder(store, "perfect"), store, tokens)
    assert found["metrics/kldiv_reconstructed"] == pytest.approx(0, abs=1e-6)
    # With a query of zeros all scores are 0: query i spreads evenly over its i + 1 keys.
    with torch.no_grad():
        pattern = plain_model(tokens, output_attentions=True).attentions[LAYER][:, head].double()
    evenly = torch.ones(16, 16).tril() / torch.arange(1, 17).unsqueeze(1)
    terms = torch.where(pattern > 0, pattern * (pattern / evenly).log2(), 0)
    expected = terms.nan_to_num(0).sum(dim=-1).mean().item()
    assert expected > 0
    assert found["metrics/kldiv_ablation"] == pytest.approx(expected, rel=1e-3)


def test_attention_of_head_output_cannot_change(make_store: Make, tokens: Tensor) -> None:
    # hook_z comes after the pattern.
    store = make_store(hook_point=f"blocks.{LAYER}.attn.hook_z", hook_point_head_index=0, d_in=D_HEAD)
    found = evaluate(autoencoder(store, "zero"), store, tokens)
    assert found["metrics/kldiv_reconstructed"] == found["metrics/kldiv_ablation"] == 0
    assert found["metrics/ce_loss_with_ablation"] != found["metrics/ce_loss_without_sae"]


@pytest.mark.parametrize("hook", ["hook_resid_post", "attn.hook_z"])
def test_whole_width_hooks_have_no_attention_figures(make_store: Make, tokens: Tensor, hook: str) -> None:
    store = make_store(hook_point=f"blocks.{LAYER}.{hook}")
    found = evaluate(autoencoder(store, "perfect"), store, tokens)
    assert not [name for name in found if "kldiv" in name]
    assert found["metrics/CE_loss_score"] == pytest.approx(1, abs=1e-5)


def test_one_head_leaves_the_others_alone(make_store: Make, tokens: Tensor) -> None:
    all_heads = make_store(hook_point=f"blocks.{LAYER}.attn.hook_z")
    one_head = make_store(hook_point=f"blocks.{LAYER}.attn.hook_z", hook_point_head_index=2, d_in=D_HEAD)
    sae = autoencoder(all_heads, "perfect")
    with torch.no_grad():  # zeros for head 2 alone
        sae.W_dec[:, 2 * D_HEAD : 3 * D_HEAD] = 0
    expected = evaluate(sae, all_heads, tokens)["metrics/ce_loss_with_sae"]
    found = evaluate(autoencoder(one_head, "zero"), one_head, tokens)
    assert found["metrics/ce_loss_with_ablation"] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------- what the figures are over


@pytest.mark.parametrize(("exclude", "rows"), [(False, 64), (True, 60)])
def test_figures_say_how_many_rows_and_tokens_they_are_over(
    make_store: Make, tokens: Tensor, exclude: bool, rows: int
) -> None:
    store = make_store(exclude_special_tokens=exclude)
    found = evaluate(autoencoder(store, "random"), store, tokens)
    counts = {"rows": rows, "positions": 64, "contexts": 4, "predicted_tokens": 60}
    assert {name: found[f"base/{name}"] for name in counts} == counts
    x = harvest(store.model, tokens, store.sites.all)[0][store.keeps(tokens)].double()
    mean = x.mean(dim=0)
    facts = {
        "mean_row_share": (len(x) * mean.pow(2).sum() / x.pow(2).sum()).item(),
        "row_std": (x - mean).pow(2).mean().sqrt().item(),
        "largest_mean_element": mean.abs().max().item(),
        "ce_loss_by_chance": math.log(store.model.cfg.d_vocab),
    }
    assert {name: found[f"base/{name}"] for name in facts} == pytest.approx(facts, rel=1e-4)


def test_no_row_that_counts_leaves_no_figures_about_rows(make_store: Make, tokens: Tensor) -> None:
    store = make_store(exclude_special_tokens=True)
    only_bos = torch.full_like(tokens, store.model.tokenizer.bos_token_id)
    found = evaluate(autoencoder(store, "random"), store, only_bos)
    assert found["base/rows"] == 0
    assert math.isnan(found["metrics/eval_explained_variance"])
    assert math.isnan(found["metrics/CE_loss_score"]), "both changed runs are the clean one"


def test_rows_that_are_all_the_same_have_no_variance_to_explain(make_store: Make, tokens: Tensor) -> None:
    store = make_store(prepend_bos=False, seqpos_slice=(0, 1))
    found = evaluate(autoencoder(store, "random"), store, tokens)  # the first position of all four is the BOS
    assert found["base/rows"] == 4
    assert found["base/row_std"] == 0
    assert math.isnan(found["metrics/eval_explained_variance"])
