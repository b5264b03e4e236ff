from __future__ import annotations

import math

import torch

from sae_training.kernels.sparse_code import Code
from sae_training.training.dead_latents import FiringTracker


def tracker(**changes) -> FiringTracker:
    return FiringTracker(**{"d_sae": 3, "dead_window": 2, "dead_window_tokens": None, **changes})


def test_latent_is_dead_only_after_more_steps_than_the_window() -> None:
    counts = tracker()
    acts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    counts.update(Code(acts))
    counts.update(Code(acts))
    assert counts.dead().tolist() == [False, False, False]  # 2 silent steps, window 2
    counts.update(Code(acts))
    assert counts.dead().tolist() == [False, True, False]


def test_firing_again_brings_a_latent_back() -> None:
    counts = tracker(dead_window=0)
    counts.update(Code(torch.tensor([[0.0, 1.0, 1.0]])))
    assert counts.dead().tolist() == [True, False, False]
    counts.update(Code(torch.tensor([[1.0, 1.0, 0.0]])))
    assert counts.dead().tolist() == [False, False, True]


def test_window_in_tokens_wins_over_window_in_steps() -> None:
    counts = tracker(dead_window=100, dead_window_tokens=5)
    silent = torch.zeros(3, 3)
    counts.update(Code(silent))
    assert not counts.dead().any()  # 3 tokens
    counts.update(Code(silent))
    assert counts.dead().all()  # 6 tokens


def test_log_frequency_spans_the_last_full_window_and_the_present_one() -> None:
    counts = tracker()
    counts.update(Code(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])))
    counts.start_new_window()
    counts.update(Code(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])))
    expected = [math.log10(2 / 4), -10.0, math.log10(3 / 4)]
    torch.testing.assert_close(counts.log_frequency(), torch.tensor(expected), atol=1e-6, rtol=0)
    counts.start_new_window()
    expected = [-10.0, -10.0, 0.0]
    torch.testing.assert_close(counts.log_frequency(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_log_frequency_before_any_token_is_that_of_silence() -> None:
    assert tracker().log_frequency().tolist() == [-10.0, -10.0, -10.0]


def test_state_round_trip_counts_on_as_before() -> None:
    one, other = tracker(), tracker()
    acts = torch.tensor([[1.0, 0.0, 1.0]])
    one.update(Code(acts))
    one.start_new_window()
    one.update(Code(acts))
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    for counts in (one, other):
        counts.update(Code(torch.tensor([[0.0, 0.0, 1.0]])))
    assert torch.equal(one.dead(), other.dead())
    assert torch.equal(one.log_frequency(), other.log_frequency())
    assert torch.equal(one.tokens_since_fired, other.tokens_since_fired)
