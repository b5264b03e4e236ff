"""What a store serves: activations of the training text, shuffled, at the hooks and positions that were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from small import D_IN, SMALL_RUN, text_of
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache import origin
from sae_training.activations_store.shuffle_buffer import ShuffleBuffer
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import load_language_model
from sae_training.language_model.sites import merged

Make = Callable[..., ActivationsStore]
HOOK = SMALL_RUN["hook_point"]


@pytest.fixture
def make_store(small_config: Callable, demo_model: Any) -> Make:
    def make(dataset: Any = None, **changes: Any) -> ActivationsStore:
        return ActivationsStore(small_config(**changes), demo_model, dataset)

    return make


def buffer_of(store: ActivationsStore) -> ShuffleBuffer:
    assert isinstance(store.source, ShuffleBuffer)
    return store.source


def test_float32_hooks_of_a_narrow_model_are_served(small_config: Callable) -> None:
    """A bfloat16 model normalises in float32."""
    store = ActivationsStore(
        small_config(hook_point="blocks.1.ln2.hook_normalized"), load_language_model("demo", lm_dtype="bfloat16")
    )
    assert store.next_batch().dtype == torch.float32
    assert buffer_of(store).buffers["blocks.1.ln2.hook_normalized"].dtype == torch.bfloat16


def test_shapes_are_those_of_the_contract(make_store: Make) -> None:
    store = make_store()
    tokens = store.get_batch_tokens()
    assert tokens.shape == (4, 16)
    assert store.get_activations(tokens).shape == (4, 16, D_IN)
    batch = store.next_batch()
    assert batch.shape == (64, D_IN)
    assert batch.dtype == torch.float32


def test_several_datasets_are_mixed(make_store: Make, tmp_path: Path) -> None:
    paths = []
    for name, word in (("a", " cat"), ("b", " dog")):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": word * 15}) + "\n") * 300)
    store = make_store(dataset_path=paths, dataset_weights=(3.0, 1.0))
    # A document is a context, or two where the words are two tokens: 3 in 4 are cats.
    texts = [store.model.tokenizer.decode(row) for _ in range(50) for row in store.get_batch_tokens()]
    n_cats = sum("cat" in text for text in texts)
    assert 120 < n_cats < 180 and n_cats + sum("dog" in text for text in texts) == len(texts)
    about = origin(store.cfg, store.model, store.text.n_held_out)
    assert (about["dataset_path"], about["dataset_weights"]) == (paths, [0.75, 0.25])


def test_activations_may_be_trained_on(make_store: Make) -> None:
    store = make_store()
    weight = torch.ones(D_IN, requires_grad=True)
    (store.get_activations(store.get_batch_tokens()) * weight).sum().backward()
    assert weight.grad is not None


def passes_of(store: ActivationsStore, n: int) -> Tensor:
    """Activations (n, prompts, positions, width) of the first `n` passes over the training text.

    Each pass is made alone, as the store makes it: in another shape a processor may round otherwise.
    """
    stream = store.text.stream(store.text.documents, store.text.n_held_out)
    passes = [stream.next_contexts(store.store_batch_size) for _ in range(n)]
    return torch.stack([harvest(store.model, tokens, store.sites.inputs)[0] for tokens in passes])


def all_rows(store: ActivationsStore, n_passes: int) -> Tensor:
    return passes_of(store, n_passes).flatten(end_dim=2)


def positions(rows: Tensor, among: Tensor) -> list[list[int]]:
    """Return for each row where it stands in `among`."""
    return [(among == row).all(dim=1).nonzero().flatten().tolist() for row in rows]


def test_batches_hold_activations_of_the_training_text(make_store: Make) -> None:
    store = make_store()
    text_rows = all_rows(store, 4)
    found = positions(store.next_batch(), text_rows)
    assert all(found)


def test_a_batch_mixes_prompts(make_store: Make) -> None:
    store = make_store()
    text_rows = all_rows(store, 4)
    prompts = {where[0] // 16 for where in positions(store.next_batch(), text_rows)}
    assert len(prompts) > 10  # of 16 in the buffer


def test_refill_happens_in_place_when_half_is_served(make_store: Make) -> None:
    store = make_store(exclude_special_tokens=True)  # all BOS rows are alike
    store.next_batch()
    buffer = buffer_of(store).buffers[HOOK]
    address, before = buffer.data_ptr(), buffer.clone()
    store.next_batch()
    assert torch.equal(buffer, before)
    served = buffer_of(store).order[: buffer_of(store).served].clone()
    store.next_batch()
    buffer = buffer_of(store).buffers[HOOK]
    assert buffer.data_ptr() == address
    kept = torch.ones(len(buffer), dtype=torch.bool)
    kept[served] = False
    assert torch.equal(buffer[kept], before[kept])
    assert (buffer[served] != before[served]).any(dim=1).all()


def test_buffer_keeps_the_models_precision(make_store: Make) -> None:
    store = make_store()
    store.next_batch()
    assert buffer_of(store).buffers[HOOK].dtype == store.model.cfg.dtype


@pytest.mark.parametrize("n_before", [0, 1, 2, 5])
def test_restored_store_serves_the_same_batches(make_store: Make, n_before: int) -> None:
    one = make_store()
    for _ in range(n_before):
        one.next_batch()
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in one.state_dict().items()
    }
    other = make_store()
    other.load_state_dict(state)
    for _ in range(7):
        assert torch.equal(one.next_batch(), other.next_batch())


def test_the_order_is_the_same_for_all_seeds(make_store: Make) -> None:
    assert torch.equal(make_store(seed=1).next_batch(), make_store(seed=2).next_batch())


def test_sites_that_are_served_together_have_the_batches_they_have_alone(make_store: Make) -> None:
    alone = {hook: make_store(hook_point=hook) for hook in (f"blocks.{layer}.hook_resid_post" for layer in (0, 2))}
    sites = {hook: store.sites for hook, store in alone.items()}
    together = ActivationsStore(
        alone["blocks.0.hook_resid_post"].cfg,
        alone["blocks.0.hook_resid_post"].model,
        sites=merged(sites.values()),
    )
    for _ in range(5):
        together.advance()
        for hook, store in alone.items():
            assert torch.equal(together.batch(sites[hook]).x, store.next_batch())


def test_a_batch_is_gathered_once_for_all_that_ask(make_store: Make) -> None:
    store = make_store()
    store.advance()
    assert store.batch(store.sites).x is store.batch(store.sites).x


def test_excluded_special_tokens_never_reach_a_batch(make_store: Make) -> None:
    store = make_store(exclude_special_tokens=True)
    bos = store.model.tokenizer.bos_token_id
    first = store.get_activations(torch.tensor([[bos, 5, 6, 7]]))[0, 0]
    batches = torch.cat([store.next_batch() for _ in range(5)])
    distance = 1e-4 * first.norm()  # roundings differ with the shape of a pass
    assert ((batches - first).norm(dim=1) > distance).all()
    kept = make_store().next_batch()
    assert ((kept - first).norm(dim=1) < distance).any()


def test_only_the_positions_asked_for_reach_a_batch(make_store: Make) -> None:
    store = make_store(seqpos_slice=(2, 16, 3))
    assert store.keeps(torch.zeros(2, 16, dtype=torch.long))[1].nonzero().flatten().tolist() == [2, 5, 8, 11, 14]
    wanted = passes_of(store, 15)[:, :, 2:16:3].flatten(end_dim=2)
    assert all(positions(store.next_batch(), wanted))


def test_outliers_by_norm_never_reach_a_batch(make_store: Make) -> None:
    """The demo model's BOS position is many times longer than the rest; no token id says so here."""
    everything, store = make_store(), make_store(max_activation_norm_multiple=3.0)
    first = everything.text.stream(everything.text.documents).next_contexts(8192 // 16)
    norms = harvest(store.model, first, store.sites.all)[0].norm(dim=-1)
    limit = 3 * norms.flatten().sort().values[8192 // 2 - 1]  # the lower of the two in the middle
    tokens = everything.get_batch_tokens()
    rows = harvest(store.model, tokens, store.sites.all)[0]
    inside = rows.norm(dim=-1) <= limit
    assert not inside[:, 0].any()
    assert inside[:, 1:].float().mean() > 0.9
    assert torch.equal(store.keeps(tokens, rows), inside)
    assert torch.equal(buffer_of(store).passes.next_rows()[HOOK], rows[inside])
    served = torch.cat([store.next_batch() for _ in range(6)]).norm(dim=1)
    assert served.max() <= limit * 1.001 < everything.next_batch().norm(dim=1).max()


def test_a_rule_about_norms_needs_activations(make_store: Make) -> None:
    store = make_store(max_activation_norm_multiple=3.0)
    with pytest.raises(ValueError, match="activations: max_activation_norm_multiple is about their norms"):
        store.keeps(store.get_batch_tokens())


def test_rules_that_leave_nothing_end_with_a_sentence(make_store: Make) -> None:
    store = make_store(exclude_special_tokens=True, seqpos_slice=(0, 1))  # the BOS position alone
    with pytest.raises(ValueError, match="found no activation to train on in 20 passes of the language model"):
        store.next_batch()


def test_a_rule_about_norms_is_for_one_hook(small_config: Callable) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    with pytest.raises(ValueError, match="max_activation_norm_multiple: found 3.0 with several hooks, expected one"):
        small_config(hook_point=hooks, max_activation_norm_multiple=3.0)
    small_config(hook_point=hooks[:1], max_activation_norm_multiple=3.0)
    with pytest.raises(ValueError, match="max_activation_norm_multiple: found 0.5, expected at least 1"):
        small_config(max_activation_norm_multiple=0.5)


def test_odd_row_counts_lose_nothing(make_store: Make) -> None:
    # Without the BOS a prompt gives 15 rows, so refills end in the middle of a harvest; the rest is used next.
    store = make_store(exclude_special_tokens=True)
    for _ in range(6):
        store.next_batch()
    n_harvested = store.text.tokens.context_index * 15
    held_out = store.text.tokens.context_index // 20
    n_used = 256 + 2 * 128 + len(buffer_of(store).spill[HOOK])
    assert n_harvested - min(held_out, store.text.n_held_out) * 15 == n_used


def test_head_hook_gives_one_heads_width(make_store: Make) -> None:
    d_head = D_IN // make_store().model.cfg.n_heads
    store = make_store(hook_point="blocks.1.attn.hook_z", hook_point_head_index=0, d_in=d_head)
    assert store.next_batch().shape == (64, d_head)


def test_hook_z_without_head_index_concatenates_the_heads(make_store: Make) -> None:
    assert make_store(hook_point="blocks.1.attn.hook_z", d_in=D_IN).next_batch().shape == (64, D_IN)


def test_held_out_tokens_are_never_trained_on(make_store: Make) -> None:
    store = make_store()
    held_out = {tuple(row) for row in store.held_out_tokens().tolist()}
    assert len(held_out) == 4
    trained = {tuple(row) for _ in range(60) for row in store.get_batch_tokens().tolist()}
    assert not held_out & trained


def test_eval_dataset_is_used_for_evaluation_only(make_store: Make) -> None:
    store = make_store(eval_dataset_path="demo-held-out")
    assert store.text.n_held_out == 0
    text = store.model.tokenizer.decode(store.held_out_tokens()[0][1:])
    from sae_training.demo_data import DEMO_HELD_OUT_TEXT

    assert text[:30].strip() in text_of(DEMO_HELD_OUT_TEXT).replace("\\n", "\n")


def test_dataset_object_stands_in_for_the_path(make_store: Make) -> None:
    dataset = Dataset.from_dict({"tokens": [[5] * 400, [6] * 400]})
    tokens = make_store(dataset, n_eval_batches=1).get_batch_tokens()
    assert set(tokens.flatten().tolist()) <= {0, 5, 6}


def test_duck_typed_config_of_the_mats_era_is_enough(demo_model: Any) -> None:
    cfg = SimpleNamespace(
        model_name="demo", hook_point="blocks.0.hook_resid_post", hook_point_layer=1, hook_point_head_index=None,
        dataset_path="demo", is_dataset_tokenized=False, context_size=16, d_in=D_IN, n_batches_in_buffer=4,
        store_batch_size=4, train_batch_size=32, device=torch.device("cpu"), dtype=torch.float32, seed=0,
    )  # fmt: skip
    store = ActivationsStore(cfg, demo_model)
    assert store.cfg is cfg
    assert store.model is demo_model
    assert store.next_batch().shape == (32, D_IN)


def test_cache_config_is_enough(make_store: Make, demo_model: Any) -> None:
    names = ("model_name", "hook_point", "lm_dtype", "dataset_path", "context_size", "store_batch_size")
    cfg = CacheActivationsRunnerConfig(**{name: SMALL_RUN[name] for name in names}, n_eval_batches=1, dtype="int8")
    store, expected = ActivationsStore(cfg, demo_model), make_store()
    tokens = store.get_batch_tokens()
    assert torch.equal(tokens, expected.get_batch_tokens())
    assert torch.equal(store.get_activations(tokens), expected.get_activations(tokens))


def test_context_longer_than_the_models_names_both(make_store: Make) -> None:
    with pytest.raises(ValueError, match="context_size: got 512, but the model reads at most 256"):
        make_store(context_size=512)


def test_batch_larger_than_half_the_buffer_names_both(demo_model: Any, small_config: Callable) -> None:
    cfg = SimpleNamespace(**{**vars(small_config()), "train_batch_size": 200, "d_sae": 512})
    store = ActivationsStore(cfg, demo_model)
    with pytest.raises(ValueError, match="found 200 rows a step, expected at most 128, half the buffer"):
        store.next_batch()
