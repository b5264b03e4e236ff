"""`pack_sequences=False`: one sequence a context, as if each went through the language model alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small import D_IN, SMALL_RUN, VOCAB
from torch import Tensor

from sae_training.activations_store import ActivationsStore
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.language_model.harvest import harvest
from sae_training.language_model.load import hooked_transformer_class
from sae_training.language_model.sites import find_hook_site
from sae_training.lm_runner import language_model_sae_runner
from sae_training.run.evals import evaluate, evaluate_run
from sae_training.sparse_autoencoder import SparseAutoencoder

CONTEXT = 16
LENGTHS = [9, 1, 15, 4, 12, 2, 7]
HOOK = SMALL_RUN["hook_point"]


def sequences(n: int) -> list[list[int]]:
    ids = torch.randint(1, 2000, (n, CONTEXT), generator=torch.Generator().manual_seed(0)).tolist()
    return [row[: LENGTHS[i % len(LENGTHS)]] for i, row in enumerate(ids)]


SEQUENCES = sequences(4 * 60)
DATASET = datasets.Dataset.from_dict({"tokens": SEQUENCES})


@pytest.fixture(scope="module", params=["TransformerBridge", "HookedTransformer"])
def model(request: pytest.FixtureRequest, demo_model: Any) -> Any:
    if request.param == "TransformerBridge":
        return demo_model
    HookedTransformer = hooked_transformer_class()
    if HookedTransformer is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_IN, n_heads=2, d_head=16, n_ctx=64, d_vocab=VOCAB, act_fn="gelu", seed=0, d_mlp=32
    )
    return HookedTransformer(cfg, tokenizer=demo_model.tokenizer)


@pytest.fixture
def unjoined(small_config: Callable) -> Callable:
    def make(**changes: Any) -> Any:
        return small_config(**{"pack_sequences": False, "context_size": CONTEXT, **changes})

    return make


def alone(row: Tensor) -> Tensor:
    """The one sequence in a context, (1, its length)."""
    return row[row >= 0].unsqueeze(0)


# --------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    "hook", [HOOK, "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.0.attn.hook_k", "blocks.1.mlp.hook_post"]
)
def test_activations_are_those_of_the_sequence_alone(hook: str, model: Any, unjoined: Callable) -> None:
    store = ActivationsStore(unjoined(hook_point=hook, d_in=None), model, DATASET)
    tokens = torch.cat([store.get_batch_tokens(), store.get_batch_tokens()])
    bos = model.tokenizer.bos_token_id
    assert [alone(row)[0].tolist() for row in tokens] == [[bos, *ids] for ids in SEQUENCES[:8]]
    found, keep = store.get_activations(tokens), store.keeps(tokens)
    assert torch.equal(keep, tokens >= 0)
    site = find_hook_site(model, hook)
    for row, activations in zip(tokens, found, strict=True):
        (expected,) = harvest(model, alone(row), [site])
        torch.testing.assert_close(activations[: expected.shape[1]], expected[0], rtol=1e-4, atol=1e-4)


def test_batches_hold_no_padding_and_resume(model: Any, unjoined: Callable) -> None:
    store = ActivationsStore(unjoined(), model, DATASET)
    tokens = store.text.stream(store.text.documents).next_contexts(len(SEQUENCES))
    wanted = torch.cat([store.get_activations(rows)[rows >= 0] for rows in tokens.split(4)])
    for _ in range(2):
        assert (torch.cdist(store.next_batch(), wanted).min(dim=1).values < 0.1).all()  # of rows that are 10 apart
    state, after = store.state_dict(), ActivationsStore(unjoined(), model, DATASET)
    after.load_state_dict(state)
    for _ in range(4):
        assert torch.equal(after.next_batch(), store.next_batch())


def test_slices_count_from_the_ends_of_sequences(demo_model: Any, unjoined: Callable) -> None:
    tokens = torch.tensor([[0, 5, 6, 7], [0, 5, -1, -1], [0, -1, -1, -1]])
    for bounds, expected in {
        (-1, None): [[3], [1], [0]],
        (1, None): [[1, 2, 3], [1], []],
        (None, -1): [[0, 1, 2], [0], []],
        (None, None, 2): [[0, 2], [0], [0]],
        (-2, -1): [[2], [0], []],
    }.items():
        store = ActivationsStore(unjoined(seqpos_slice=bounds), demo_model, DATASET)
        assert [row.nonzero().flatten().tolist() for row in store.keeps(tokens)] == expected


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("changes", [{}, {"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": 1}])
def test_evaluation_counts_what_each_sequence_alone_does(
    changes: dict[str, Any], model: Any, unjoined: Callable
) -> None:
    changes = changes | ({"d_in": None} if changes else {})
    width = find_hook_site(model, changes.get("hook_point", HOOK), changes.get("hook_point_head_index")).d_in
    store = ActivationsStore(unjoined(**changes | {"d_in": width}), model, DATASET)
    plain = ActivationsStore(unjoined(**changes | {"d_in": width, "pack_sequences": True}), model, DATASET)
    sae = SparseAutoencoder(store.cfg)
    tokens = store.held_out_tokens()
    assert bool((tokens < 0).any())
    figures = evaluate(sae, store, tokens)
    singles = [(alone(row), evaluate(sae, plain, alone(row))) for row in tokens if len(row[row >= 0]) > 1]
    counts = {"ce_loss": -1, "kl_with": -1, "kldiv": 0, "eval_l0": 0, "l2_norm": 0}  # a sequence of n predicts n - 1
    for name, value in figures.items():
        less = next((n for start, n in counts.items() if f"metrics/{start}" in name), None)
        if less is None:
            continue
        weights = [ids.shape[1] + less for ids, _ in singles]
        expected = sum(w * single[name] for w, (_, single) in zip(weights, singles, strict=True)) / sum(weights)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5), name


# --------------------------------------------------------------------------------------------------------------- caches


def write(demo_model: Any, folder: Path, data: str, form: str) -> Path:
    cfg = CacheActivationsRunnerConfig(
        model_name="demo", hook_point=HOOK, lm_dtype="float32", dataset_path=data, context_size=CONTEXT,
        store_batch_size=4, n_eval_batches=1, pack_sequences=False, total_training_tokens=40 * 64,
        cached_activations_path=str(folder / form), form=form,
    )  # fmt: skip
    return cache_activations_runner(cfg, demo_model)


@pytest.fixture(params=["ids", "text"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file of short documents."""
    path = tmp_path / f"{request.param}.jsonl"
    rows = [{"tokens": ids} for ids in SEQUENCES]
    if request.param == "text":
        rows = [{"text": "the cat sat on the mat " * (1 + i % 3)} for i in range(len(SEQUENCES))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def weights(sae: Any) -> list[Tensor]:
    return [weight.clone() for _, weight in sae.weights()]


def test_training_from_contexts_of_a_cache_is_training_live(
    data: str, unjoined: Callable, demo_model: Any, tmp_path: Path
) -> None:
    folder = write(demo_model, tmp_path, data, "contexts")
    cached = unjoined(
        dataset_path=data, run_name="cached", use_cached_activations=True, cached_activations_path=str(folder)
    )
    from_cache = weights(language_model_sae_runner(cached, demo_model))
    from_model = weights(language_model_sae_runner(unjoined(dataset_path=data, run_name="live"), demo_model))
    assert all(torch.equal(a, b) for a, b in zip(from_cache, from_model, strict=True))
    figures = evaluate_run(Path(cached.run_dir) / "cached")
    scored = {name: value for name, value in figures.items() if name != "metrics/CE_loss_score"}  # NaN: ids at random
    assert all(map(math.isfinite, scored.values()))


def test_rows_of_a_cache_are_those_of_tokens(unjoined: Callable, demo_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in SEQUENCES))
    folder = write(demo_model, tmp_path, str(path), "rows")
    n_held_out = 4
    contexts = 40 * 4
    kept = [1 + len(ids) for i, ids in enumerate(SEQUENCES) if i % 20 != 19 or i // 20 >= n_held_out][:contexts]
    listed = json.loads((folder / "manifest.json").read_text())
    assert sum(shard["n"] for shard in listed["rows"]) == sum(kept)
    with pytest.raises(ValueError, match="pack_sequences: this run has pack sequences True, but"):
        language_model_sae_runner(
            unjoined(
                dataset_path=str(path),
                pack_sequences=True,
                use_cached_activations=True,
                cached_activations_path=str(folder),
            ),
            demo_model,
        )


def test_the_norm_rule_does_not_count_padding(demo_model: Any, unjoined: Callable) -> None:
    store = ActivationsStore(unjoined(max_activation_norm_multiple=3.0), demo_model, DATASET)
    contexts = store.text.tokens.first_contexts(8192 // CONTEXT)
    norms = [store.get_activations(rows)[rows >= 0].norm(dim=-1) for rows in contexts.split(4)]
    assert store.rule.max_norm == pytest.approx(3 * torch.cat(norms).median().item(), rel=1e-5)
