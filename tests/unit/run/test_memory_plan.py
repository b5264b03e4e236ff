"""The memory plan: what it counts, by hand, and what it says when a run cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from small import D_IN, D_SAE

from sae_training.activations_store import ActivationsStore
from sae_training.config.sweep import variants
from sae_training.run.memory_plan import Kind, MemoryPlan, NotEnoughMemory, Part, check_memory, plan_memory

MEAN = "expected_average_only_in"


@pytest.fixture
def plan_of(small_config: Callable, demo_model: Any) -> Callable[..., MemoryPlan]:
    def make(**changes: Any) -> MemoryPlan:
        cfg = small_config(**changes)
        singles = list(variants(cfg).values())
        return plan_memory(cfg, singles, ActivationsStore(singles[0], demo_model))

    return make


def sizes(plan: MemoryPlan) -> dict[Kind, int]:
    return {part.kind: part.bytes for part in plan.parts}


def test_what_is_held_follows_from_the_sizes(plan_of: Callable) -> None:
    plan = plan_of(architecture="topk")
    held = {part.name: part.bytes for part in plan.held}
    # 4 * 4 * 16 rows of float32, and their order in int64.
    assert held[f"buffer, 256 rows x {D_IN}"] == 256 * (D_IN * 4 + 8)
    weights = 4 * (2 * D_IN * D_SAE + D_SAE + D_SAE + D_IN)
    assert held["weights"] == pytest.approx(weights, rel=0.01)
    assert held["optimizer state"] == pytest.approx(2 * weights, rel=0.01)
    several = {part.name: part.bytes for part in plan_of(architecture="topk", k=[4, 8], optimizer="signum").held}
    assert several["weights of 2 autoencoders, 0.00 GiB each"] == pytest.approx(2 * weights, rel=0.01)
    assert several["optimizer state"] == pytest.approx(2 * weights, rel=0.01)


def test_a_copy_is_of_all_that_is_saved(plan_of: Callable) -> None:
    saved = (Kind.BUFFER, Kind.WEIGHTS, Kind.OPTIMIZER)
    plain, scaled = sizes(plan_of()), sizes(plan_of(normalize_activations="expected_average_only_in"))
    assert plain[Kind.COPY] == sum(plain[kind] for kind in saved)
    assert scaled[Kind.COPY] == sum(scaled[kind] for kind in saved) + scaled[Kind.WEIGHTS]  # and those folded
    assert Kind.COPY not in sizes(plan_of(checkpoint_every_minutes=None))


def test_averages_of_weights_are_held_as_well(plan_of: Callable) -> None:
    plain, averaged = sizes(plan_of()), sizes(plan_of(ema_decay=0.9))
    assert averaged[Kind.AVERAGES] == averaged[Kind.WEIGHTS] == plain[Kind.WEIGHTS]
    assert Kind.AVERAGES not in plain


def test_a_step_holds_gradients_and_what_its_rows_need(plan_of: Callable) -> None:
    weights = sizes(plan_of())[Kind.WEIGHTS]
    whole, parts = (sizes(plan_of(train_batch_size=128, micro_batch_size=micro))[Kind.STEP] for micro in (None, 16))
    # Of a dense step, 9 tensors as wide as a row and 6 as wide as the code, in float32.
    assert whole - weights == 128 * (9 * D_IN + 6 * D_SAE) * 4
    assert parts - weights == 16 * (9 * D_IN + 6 * D_SAE) * 4


def test_a_run_that_cannot_fit_is_refused_with_the_table(small_config: Callable) -> None:
    gib = 2**30
    parts = (Part(Kind.BUFFER, 9 * gib, ", 9 rows x 9"), Part(Kind.WEIGHTS, 2 * gib), Part(Kind.STEP, gib))
    plan = MemoryPlan(parts, gib, 10 * gib)
    assert (plan.needed, plan.peak) == (12 * gib, 13 * gib)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(plan, small_config(), n_saes=1)
    message = str(caught.value)
    assert "needs 12.00 GiB more, but 10.00 GiB are free" in message
    assert plan.table() in message
    # 0.97 * 10 - 3 of the 9 GiB, of 4 batches
    assert "The largest part is buffer, 9 rows x 9: lower n_batches_in_buffer (now 4) to about 2." in message
    check_memory(replace(plan, available=13 * gib), small_config(), n_saes=1)


def test_the_table_names_every_part_and_what_does_not_come_at_the_same_time() -> None:
    parts = (Part(Kind.STEP, 5 * 2**30), Part(Kind.WEIGHTS, 2**30), Part(Kind.EVALUATION, 2**30))
    lines = [" ".join(line.split()) for line in MemoryPlan(parts, 2 * 2**30, 30 * 2**30, lm=2**29).table().splitlines()]
    assert lines == [
        "now, with the language model 2.00 GiB (0.50 GiB of it its weights)",
        "weights 1.00 GiB",
        "a training step 5.00 GiB",
        "an evaluation 1.00 GiB (not at the same time)",
        "peak 8.00 GiB",
        "the machine has 32.00 GiB",
    ]


def test_processes_of_a_machine_share_its_memory(plan_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = plan_of(device="cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    of_four = plan_of(device="cpu")
    assert of_four.available < 0.3 * alone.available  # 0.25, and what other programs give back meanwhile
    assert of_four.table().endswith("(for each of 4 processes)") and "processes" not in alone.table()
    assert of_four.line().endswith(", the share of each of 4 processes.") and "processes" not in alone.line()


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        (Kind.STEP, r"or set micro_batch_size lower \(now 64\)\."),
        (Kind.EVALUATION, "set eval_every_steps=0"),
        (Kind.CHECKPOINT, r"lower expansion_factor \(now 2; the rest does not fit either\)\."),
        (Kind.PASS, "lower store_batch_size"),
    ],
    ids=lambda value: value.value if isinstance(value, Kind) else "",
)
def test_the_advice_is_about_the_largest_part(largest: Kind, advice: str, small_config: Callable) -> None:
    # What the process needs besides is more than there is, so that no dictionary would be small enough.
    plan = MemoryPlan((Part(Kind.BUFFER, 90), Part(largest, 100)), 1, 10)
    with pytest.raises(NotEnoughMemory, match=f"The largest part is {largest.value}: .*{advice}"):
        check_memory(plan, small_config(), n_saes=9)


def test_what_grows_with_the_dictionary_is_to_be_smaller(small_config: Callable) -> None:
    parts = (Part(Kind.WEIGHTS, 40, " of 9 autoencoders, 1.00 GiB each"), Part(Kind.OPTIMIZER, 80), Part(Kind.STEP, 20))
    plan = MemoryPlan(parts, 1, 100)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(plan, small_config(expansion_factor=16), n_saes=9)
    message = str(caught.value)
    # All of the 140 grow with it, 97 can be had. In 8 bits the 80 would be 21.
    assert "train fewer autoencoders at once, or lower expansion_factor (now 16) to about 11, or set opt" in message
    assert "a quarter of the optimizer's memory)" in message
    with pytest.raises(NotEnoughMemory, match="a quarter of the optimizer's memory, which by itself is not enough"):
        check_memory(replace(plan, available=50), small_config(expansion_factor=16), n_saes=9)


@pytest.mark.parametrize("changes", [{"optimizer": "adam8bit"}, {"feature_sampling_method": "l2"}], ids=str)
def test_8_bits_are_advised_only_where_they_help(changes: dict[str, Any], small_config: Callable) -> None:
    plan = MemoryPlan((Part(Kind.OPTIMIZER, 80), Part(Kind.STEP, 20)), 1, 90)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(plan, small_config(**changes), n_saes=1)
    assert "adam8bit" not in str(caught.value)


def test_copies_of_scaled_autoencoders_count(plan_of: Callable) -> None:
    plain, scaled = (
        sizes(plan_of(k=[4, 8], architecture="topk", normalize_activations=mode)) for mode in ("none", MEAN)
    )
    for kind in (Kind.EVALUATION, Kind.CHECKPOINT):
        assert scaled[kind] - plain[kind] == plain[Kind.WEIGHTS]
