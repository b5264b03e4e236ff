"""The memory plan: what it counts, by hand, and what it says when a run cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sae_training.activations_store import ActivationsStore
from sae_training.config.sweep import variants
from sae_training.lm_runner import run_config
from sae_training.run import memory_plan
from sae_training.run.memory_plan import MemoryPlan, NotEnoughMemory, check_memory, plan_memory

MEAN = "expected_average_only_in"


@pytest.fixture
def plan_of(small_config: Callable, demo_model: Any) -> Callable[..., MemoryPlan]:
    def make(**changes: Any) -> MemoryPlan:
        cfg = small_config(**changes)
        singles = list(variants(cfg).values())
        return plan_memory(cfg, singles, ActivationsStore(singles[0], demo_model))

    return make


def test_what_is_held_follows_from_the_sizes(plan_of: Callable) -> None:
    held = plan_of(architecture="topk").held
    # 4 * 4 * 16 rows of 256 float32, and their order in int64.
    assert held["buffer, 256 rows x 256"] == 256 * (256 * 4 + 8)
    weights = 4 * (2 * 256 * 512 + 512 + 512 + 256)
    assert held["weights"] == pytest.approx(weights, rel=0.01)
    assert held["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    several = plan_of(architecture="topk", k=[4, 8], optimizer="signum").held
    assert several["weights of 2 autoencoders, 0.00 GiB each"] == pytest.approx(2 * weights, rel=0.01)
    assert several["their optimizers"] == pytest.approx(2 * weights, rel=0.01)


def test_micro_batches_bound_the_step(plan_of: Callable) -> None:
    whole, parts = (plan_of(train_batch_size=128, micro_batch_size=micro) for micro in (None, 16))
    assert parts.passing["a training step"] < whole.passing["a training step"]


def test_a_run_that_cannot_fit_is_refused_with_the_table(plan_of: Callable, small_config: Callable) -> None:
    gib = 2**30
    plan = MemoryPlan({"buffer, 9 rows x 9": 9 * gib, "weights and optimizer": 2 * gib}, {"a step": gib}, gib, 10 * gib)
    assert (plan.needed, plan.peak) == (12 * gib, 13 * gib)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(plan, small_config(), n_saes=1)
    message = str(caught.value)
    assert "needs 12.00 GiB more, but 10.00 GiB are free" in message
    # 0.97 * 10 - 3 of the 9 GiB, of 4 batches
    assert "The largest part is buffer, 9 rows x 9: lower n_batches_in_buffer (now 4) to about 2." in message
    check_memory(replace(plan, available=13 * gib), small_config(), n_saes=1)


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        ("a training step", r"or set micro_batch_size lower \(now 64\)\."),
        ("an evaluation", "set eval_every_steps=0"),
        ("a checkpoint", r"lower expansion_factor \(now 2; the rest does not fit either\)\."),
        ("a pass of the language model", "lower store_batch_size"),
    ],
)
def test_the_advice_is_about_the_largest_part(largest: str, advice: str, small_config: Callable) -> None:
    plan = MemoryPlan({"other": 1}, {largest: 100, "x": 2}, 1, 10)
    with pytest.raises(NotEnoughMemory, match=advice):
        check_memory(plan, small_config(), n_saes=9)


def test_what_grows_with_the_dictionary_is_to_be_smaller(small_config: Callable) -> None:
    held = {"weights of 9 autoencoders, 1.00 GiB each": 40, "their optimizers": 80}
    plan = MemoryPlan(held, {"a training step": 20}, 1, 100)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(plan, small_config(expansion_factor=16), n_saes=9)
    message = str(caught.value)
    # All of the 140 grow with it, 97 can be had. In 8 bits the 80 would be 21.
    assert "train fewer autoencoders at once, or lower expansion_factor (now 16) to about 11, or set opt" in message
    assert "a quarter of the optimizer's memory)" in message
    with pytest.raises(NotEnoughMemory, match="a quarter of the optimizer's memory, which by itself is not enough"):
        check_memory(replace(plan, available=50), small_config(expansion_factor=16), n_saes=9)


def test_copies_of_scaled_autoencoders_count(plan_of: Callable) -> None:
    plain, scaled = (plan_of(k=[4, 8], architecture="topk", normalize_activations=mode) for mode in ("none", MEAN))
    weights = plain.held["weights of 2 autoencoders, 0.00 GiB each"]
    for name in ("an evaluation", "a checkpoint"):
        assert scaled.passing[name] - plain.passing[name] == weights


def test_nothing_is_started(
    small_config: Callable, demo_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(memory_plan, "memory_of", lambda device: (2**30, 2**20))
    with pytest.raises(NotEnoughMemory, match="memory: this run needs"):
        run_config(small_config(), demo_model)
    assert not (tmp_path / "runs").exists()


def test_the_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("123456789\n")
    monkeypatch.setattr(memory_plan, "CGROUP_LIMITS", (str(tmp_path / "no-such-file"), str(limit)))
    assert memory_plan.limit_of_container() == 123456789
    limit.write_text("max\n")
    assert memory_plan.limit_of_container() == float("inf")
