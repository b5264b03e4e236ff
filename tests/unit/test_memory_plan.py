"""The memory plan: what it counts, by hand, and what it says when a run cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sae_training import memory_plan
from sae_training.activations_store import ActivationsStore
from sae_training.lm_runner import run_config
from sae_training.memory_plan import MemoryPlan, NotEnoughMemory, check_memory, plan_memory
from sae_training.sweep import variants


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
    assert held["weights and optimizer"] == pytest.approx(3 * weights, rel=0.01)
    several = plan_of(architecture="topk", k=[4, 8], optimizer="signum").held
    assert several["weights and optimizers of 2 autoencoders"] == pytest.approx(2 * 2 * weights, rel=0.01)


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
    assert "The largest part is buffer, 9 rows x 9: lower n_batches_in_buffer (now 4)." in message
    check_memory(replace(plan, available=13 * gib), small_config(), n_saes=1)


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        ("weights and optimizers of 9 autoencoders", "train fewer autoencoders at once"),
        ("a training step", "set micro_batch_size"),
        ("an evaluation", "set eval_every_steps=0"),
        ("a pass of the language model", "lower store_batch_size"),
    ],
)
def test_the_advice_is_about_the_largest_part(largest: str, advice: str, small_config: Callable) -> None:
    plan = MemoryPlan({"other": 1}, {largest: 100, "x": 2}, 1, 10)
    with pytest.raises(NotEnoughMemory, match=advice):
        check_memory(plan, small_config(), n_saes=9)


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
