from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from sae_training.training.optim import make_optimizer, moments
from sae_training.training.schedules import SCHEDULERS, annealed_k, lr_factor, warm_up_factor


def test_constant_ignores_warm_up() -> None:
    assert [lr_factor(s, "constant", 10, warm_up_steps=5) for s in (0, 4, 9, 100)] == [1, 1, 1, 1]


def test_constantwithwarmup_rises_from_one_over_w_to_one() -> None:
    factors = [lr_factor(s, "constantwithwarmup", 10, warm_up_steps=4) for s in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_warm_up_starts_at_full_rate(name: str) -> None:
    assert lr_factor(0, name, 10) == 1


@pytest.mark.parametrize("name", ["constantwithwarmup", "linearwarmupdecay", "cosineannealingwarmup"])
def test_all_warm_up_ends_at_full_rate(name: str) -> None:
    assert lr_factor(9, name, 10, warm_up_steps=10) == 1
    assert lr_factor(4, name, 10, warm_up_steps=20) == 0.25


def test_linearwarmupdecay_falls_to_zero_one_step_after_the_last() -> None:
    # W = 2, T = 6: the line from 1 at step 2 to 0 at step 6.
    factors = [lr_factor(s, "linearwarmupdecay", 6, warm_up_steps=2) for s in range(8)]
    assert factors == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_cosineannealing_passes_the_middle_and_stays_at_its_end() -> None:
    factors = [lr_factor(s, "cosineannealing", 8, end_factor=0.1) for s in (0, 2, 4, 8, 50)]
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    assert factors == pytest.approx([1, quarter, 0.55, 0.1, 0.1])


def test_cosineannealingwarmup_ends_at_the_end_factor_and_not_at_its_square() -> None:
    assert lr_factor(10, "cosineannealingwarmup", 10, warm_up_steps=2, end_factor=0.1) == pytest.approx(0.1)
    assert lr_factor(6, "cosineannealingwarmup", 10, warm_up_steps=2, end_factor=0.0) == pytest.approx(0.5)


def test_cosineannealingwarmrestarts_restarts_in_each_cycle() -> None:
    factors = [
        lr_factor(s, "cosineannealingwarmrestarts", 8, end_factor=0.0, n_restart_cycles=2) for s in (0, 2, 4, 6, 8, 9)
    ]
    assert factors == pytest.approx([1, 0.5, 1, 0.5, 0, 0])


def test_cosineannealingwarmrestarts_allows_more_cycles_than_steps() -> None:
    assert all(0 <= lr_factor(s, "cosineannealingwarmrestarts", 3, n_restart_cycles=5) <= 1 for s in range(4))


def test_decay_steps_fall_to_zero_at_the_end_of_any_schedule() -> None:
    factors = [lr_factor(s, "constant", 10, decay_steps=4) for s in (5, 6, 7, 8, 9, 10, 11)]
    assert factors == [1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_unknown_scheduler_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="cosineannealingwarmrestarts"):
        lr_factor(0, "cosine", 10)


def test_warm_up_factor_without_steps_is_one() -> None:
    assert warm_up_factor(0, 0) == 1
    assert warm_up_factor(0, 4) == 0.25


def test_first_adam_step_moves_each_weight_by_the_learning_rate() -> None:
    # With bias correction, m / sqrt(v) is the sign of the gradient at the first step.
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer("adam", [weight], lr=0.1, betas=(0.9, 0.999))
    weight.grad = torch.tensor([5.0, -0.01])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, -1.9]), atol=1e-5, rtol=0)


def test_signum_moves_by_the_learning_rate_along_the_sign_of_the_mean_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = make_optimizer("signum", [weight], lr=0.1, betas=(0.5, 0.999))
    # Means after the second step: 0.25 * 4 - 0.5 = 0.5, 0.25 * -4 + 0.5 = -0.5, 0.
    for gradient in ([4.0, -4.0, 0.0], [-1.0, 1.0, 0.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.8, 1.2, 1.0]))


@pytest.mark.parametrize("name", ["adam", "signum"])
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(name, [weight], lr=0.1, betas=(0.9, 0.999))
    weight.grad = torch.ones(2)
    optimizer.found_inf = torch.zeros(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    before, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.tensor([torch.nan, torch.inf])
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)


def noisy_quadratic(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: range) -> None:
    """Steps down (weight - 1)^2 / 2 with noise on the gradient, the same for each step number."""
    for step in steps:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = weight.detach() - 1 + 0.1 * noise
        optimizer.step()


def test_adam8bit_follows_adam_with_a_quarter_of_its_moments() -> None:
    weights = {name: torch.nn.Parameter(torch.zeros(64, 128)) for name in ("adam", "adam8bit")}
    optimizers = {name: make_optimizer(name, [weight], 0.01, (0.9, 0.999)) for name, weight in weights.items()}
    for name, weight in weights.items():
        noisy_quadratic(optimizers[name], weight, range(50))
    assert weights["adam"].mean() > 0.3
    torch.testing.assert_close(weights["adam8bit"], weights["adam"], atol=0.02, rtol=0)
    sizes = {
        name: sum(moment.nbytes for moment in moments(optimizers[name], weight).values() if moment.ndim)
        for name, weight in weights.items()
    }
    # 2 bytes a weight in place of 8, and two scales of 4 bytes for each 256.
    assert sizes == {"adam": 8 * 64 * 128, "adam8bit": 2 * 64 * 128 + 8 * 64 * 128 // 256}


def test_adam8bit_goes_on_from_saved_moments() -> None:
    weights = [torch.nn.Parameter(torch.zeros(64, 128)) for _ in range(2)]
    one, other = (make_optimizer("adam8bit", [weight], 0.01, (0.9, 0.999)) for weight in weights)
    noisy_quadratic(one, weights[0], range(5))
    with torch.no_grad():
        weights[1].copy_(weights[0])
    other.state[weights[1]].update({key: value.clone() for key, value in moments(one, weights[0]).items()})
    noisy_quadratic(one, weights[0], range(5, 9))
    noisy_quadratic(other, weights[1], range(5, 9))
    assert torch.equal(weights[0], weights[1])


def test_adam8bit_changes_nothing_in_a_step_that_is_not_finite() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer("adam8bit", [weight], 0.01, (0.9, 0.999))
    noisy_quadratic(optimizer, weight, range(3))
    before = [weight.detach().clone(), *(moment.clone() for moment in moments(optimizer, weight).values())]
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    after = [weight.detach(), *moments(optimizer, weight).values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_adam8bit_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes, or use adam"):
        make_optimizer("adam8bit", [], 0.01, (0.9, 0.999))


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="found 'sgd', expected 'adam', 'adam8bit' or 'signum'"):
        make_optimizer("sgd", [], lr=0.1, betas=(0.9, 0.999))


def test_k_falls_in_a_line_from_eight_times_k() -> None:
    assert [annealed_k(step, k=4, d_sae=1000, anneal_steps=4) for step in range(6)] == [32, 25, 18, 11, 4, 4]


def test_k_starts_at_half_the_dictionary_if_that_is_less() -> None:
    assert annealed_k(0, k=4, d_sae=40, anneal_steps=4) == 20
    assert annealed_k(0, k=4, d_sae=6, anneal_steps=4) == 4


def test_without_annealing_k_is_k() -> None:
    assert annealed_k(0, k=4, d_sae=1000, anneal_steps=0) == 4
