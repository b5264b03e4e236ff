"""Activations that are infinite or NaN: found where they come in, and told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import D_IN, SMALL_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_training.activations_store import ActivationsStore
from sae_training.activations_store.cache import to_stored
from sae_training.activations_store.finiteness import NonFiniteActivations, PassesChecked, cause, non_finite
from sae_training.activations_store.position_rule import PositionRule
from sae_training.cache_activations_runner import cache_activations_runner
from sae_training.config import CacheActivationsRunnerConfig
from sae_training.demo_data import DEMO_MODEL
from sae_training.language_model.load import load_language_model
from sae_training.run.evals import evaluate
from sae_training.sparse_autoencoder import SparseAutoencoder

INF, NAN = float("inf"), float("nan")
HOOK = SMALL_RUN["hook_point"]
CACHE: dict[str, Any] = {name: SMALL_RUN[name] for name in ("hook_point", "dataset_path", "context_size")}
CACHE |= {"store_batch_size": 4, "n_eval_batches": 1, "total_training_tokens": 10 * 64, "lm_dtype": "float32"}
OVERFLOW = f"activations of {HOOK} hold inf: float16 ends at 65504; set lm_dtype to bfloat16 or float32"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model whose layer 1 writes activations of some 1e5 into the residual stream."""
    folder = tmp_path_factory.mktemp("large")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 3e4
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(large: str) -> Callable[[str], Any]:
    made: dict[str, Any] = {}
    return lambda dtype: made.setdefault(dtype, load_language_model(large, lm_dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -2.0], (0, 0)), ([INF], (1, 0)), ([-INF, 0], (1, 0)), ([NAN], (0, 1)), ([NAN, -INF], (1, 1)), ([], (0, 0))],
)
def test_infinite_and_nan_are_told_apart(dtype: torch.dtype, values: list[float], expected: tuple[int, int]) -> None:
    x = torch.zeros(3, 5, dtype=dtype)[: 3 * bool(values)]
    x.view(-1)[: len(values)] = torch.tensor(values, dtype=dtype)
    assert non_finite(x).int().tolist() == [*expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, OVERFLOW),
        ({"max_activation_norm_multiple": 10.0}, OVERFLOW),
        (
            {"hook_point": "blocks.2.hook_resid_post", "exclude_special_tokens": True, "seqpos_slice": (1, None)},
            "blocks.2.hook_resid_post hold NaN",  # BOS alone is infinite in layer 1, and read by all others in layer 2
        ),
        (
            {"hook_point": "blocks.2.hook_resid_post"},
            "blocks.2.hook_resid_post hold NaN: float16 ends at 65504, a value",
        ),
        (
            {"hook_point": "blocks.1.ln2.hook_normalized", "target_hook_point": "blocks.1.hook_mlp_out"},
            "hook_mlp_out hold",
        ),
    ],
    ids=["inf", "with a rule about norms", "with rules about positions", "NaN in the next layer", "a target"],
)
def test_float16_that_overflows_serves_no_row(
    models: Callable, small_config: Callable, changes: dict[str, Any], message: str
) -> None:
    def first_row() -> None:
        ActivationsStore(small_config(lm_dtype="float16", **changes), models("float16")).sample(1)

    with pytest.raises(NonFiniteActivations) as raised:
        first_row()
    assert message in str(raised.value)


def test_wider_precisions_serve_the_same_model(models: Callable, small_config: Callable) -> None:
    for dtype in ("bfloat16", "float32"):
        store = ActivationsStore(small_config(lm_dtype=dtype), models(dtype))
        assert 65504 < store.next_batch().abs().max() < INF


def test_evaluation_of_what_overflows_gives_no_figures(models: Callable, small_config: Callable) -> None:
    store = ActivationsStore(small_config(lm_dtype="float16"), models("float16"))
    with pytest.raises(NonFiniteActivations, match="hold inf: float16 ends at 65504"):
        evaluate(SparseAutoencoder(store.cfg), store, store.held_out_tokens())


@pytest.mark.parametrize("form", ["rows", "contexts"])
def test_what_overflows_is_not_written(models: Callable, tmp_path: Path, form: str) -> None:
    values = CACHE | {"lm_dtype": "float16", "form": form, "cached_activations_path": str(tmp_path / "cache")}
    with pytest.raises(NonFiniteActivations, match=r"hold inf: float16 ends at 65504; set lm_dtype to bfloat16 or"):
        cache_activations_runner(CacheActivationsRunnerConfig(**values), models("float16"))
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("form", ["rows", "contexts"])
def test_cache_that_holds_them_serves_no_row(
    demo_model: Any, small_config: Callable, tmp_path: Path, form: str, bad: float
) -> None:
    folder = tmp_path / "cache"
    cfg = CacheActivationsRunnerConfig(**CACHE, model_name="demo", form=form, cached_activations_path=str(folder))
    cache_activations_runner(cfg, demo_model)
    shard = folder / form / "00000.safetensors"
    tensors = load_file(shard)
    tensors[HOOK].view(-1)[D_IN * 5 + 3] = bad
    save_file(tensors, shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[form][0] |= {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cached = small_config(use_cached_activations=True, cached_activations_path=str(folder))
    store = ActivationsStore(cached, demo_model)
    with pytest.raises(NonFiniteActivations, match=rf"hold {'inf' if bad == INF else 'NaN'}: .*in the cache {folder}"):
        for _ in range(8):
            store.next_batch()


def test_rows_that_a_checkpoint_holds_are_asked_again(demo_model: Any, small_config: Callable) -> None:
    store, other = (ActivationsStore(small_config(), demo_model) for _ in range(2))
    store.next_batch()
    state = store.state_dict()
    other.load_state_dict(state)
    state["buffers"][HOOK][7, 7] = NAN
    with pytest.raises(NonFiniteActivations, match="hold NaN: float32 reaches"):
        other.load_state_dict(state)


def test_flags_stay_noted_until_the_passes_are_made_anew() -> None:
    checked = PassesChecked(lambda hook, found: f"{hook} {found}")
    checked.note({"a": torch.ones(2, 2), "b": torch.ones(2, 2)})
    checked.check()
    checked.note({"a": torch.ones(2, 2), "b": torch.tensor([[1, NAN]])})
    checked.note({"a": torch.tensor([INF]), "b": torch.ones(2, 2)})
    for _ in range(2):
        with pytest.raises(NonFiniteActivations, match="b NaN"):
            checked.check()


def test_rule_about_norms_does_not_hide_them() -> None:
    activations = torch.tensor([[[1.0], [9.0], [INF], [NAN]]])
    keep = PositionRule(max_norm=5.0)(torch.zeros(1, 4, dtype=torch.long), activations)
    assert keep.tolist() == [[True, False, True, True]]


def test_positions_that_do_not_count_may_be_infinite(demo_model: Any, small_config: Callable) -> None:
    """A BOS whose norm overflows is no reason to stop a run that leaves it out."""
    store = ActivationsStore(small_config(exclude_special_tokens=True), demo_model)
    passes: Any = store.source.passes  # pyright: ignore[reportAttributeAccessIssue]
    take = passes.contexts.take

    def with_infinite_bos(n: int, n_left: int | None = None) -> Any:
        taken = take(n, n_left)
        activations = taken(HOOK).clone()
        activations[:, 0] = INF
        return {"tokens": taken("tokens"), HOOK: activations}.__getitem__

    passes.contexts.take = with_infinite_bos
    assert store.next_batch().isfinite().all()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (("inf", "float16", None), "float16 ends at 65504; set lm_dtype to bfloat16 or float32"),
        (("NaN", "float16", "W"), "(in float16 the weight W is not finite either)"),
        (("NaN", "bfloat16", "W"), "weight W is not finite; load a sound copy"),
        (("inf", "float32", None), "float32 reaches 3.4e+38 and its weights are finite"),
    ],
)
def test_cause_is_of_the_precision_or_the_model(case: tuple[str, str, str | None], expected: str) -> None:
    assert expected in cause(*case)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_narrower_files_do_not_overflow_silently(dtype: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"the largest of {dtype}; use "):
        to_stored(torch.tensor([[1.0, value]]), dtype)
