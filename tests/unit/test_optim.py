from __future__ import annotations

import math

import pytest
import torch

from sae_training.optim import SCHEDULERS, annealed_k, lr_factor, make_optimizer, warm_up_factor


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


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="found 'sgd', expected 'adam' or 'signum'"):
        make_optimizer("sgd", [], lr=0.1, betas=(0.9, 0.999))


def test_k_falls_in_a_line_from_eight_times_k() -> None:
    assert [annealed_k(step, k=4, d_sae=1000, anneal_steps=4) for step in range(6)] == [32, 25, 18, 11, 4, 4]


def test_k_starts_at_half_the_dictionary_if_that_is_less() -> None:
    assert annealed_k(0, k=4, d_sae=40, anneal_steps=4) == 20
    assert annealed_k(0, k=4, d_sae=6, anneal_steps=4) == 4


def test_without_annealing_k_is_k() -> None:
    assert annealed_k(0, k=4, d_sae=1000, anneal_steps=0) == 4
