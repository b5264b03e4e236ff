"""Processes that share the rows of each batch make the steps of one process, up to the order of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from small import SMALL_RUN

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.parallel.deal import Deal
from sae_training.parallel.peers import Peers
from sae_training.parallel.share import ALONE, Share
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.training import objective
from sae_training.training.metrics import training_metrics
from sae_training.training.trainer import SAETrainer

D, STEPS, ROWS = 8, 20, 50  # rows that neither two nor three processes can share evenly

CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "l1_coefficient": 0.02},
    "standard, by decoder norms": {"architecture": "standard", "scale_sparsity_penalty_by_decoder_norm": True},
    "ghost gradients": {"architecture": "standard", "l1_coefficient": 0.1, "use_ghost_grads": True},
    "topk": {"architecture": "topk", "k": 4, "clip_grad_norm": 0.1},
    "topk, AuxK": {"architecture": "topk", "k": 2, "auxk_coefficient": 1 / 32},
    "topk, in parts": {"architecture": "topk", "k": 2, "auxk_coefficient": 1 / 32, "micro_batch_size": 17},
    "multi-topk": {"architecture": "topk", "k": 3, "multi_topk": True},
    "batchtopk": {"architecture": "batchtopk", "k": 4},
    "batchtopk, in parts": {"architecture": "batchtopk", "k": 4, "micro_batch_size": 20},
    "matryoshka": {"architecture": "matryoshka", "k": 4, "matryoshka_widths": [4, 12]},
    "jumprelu": {"architecture": "jumprelu", "l1_coefficient": 0.02, "jumprelu_bandwidth": 0.5},
    "jumprelu, target_l0": {"architecture": "jumprelu", "target_l0": 5, "jumprelu_bandwidth": 0.5, "l1_coefficient": 1},
    "gated": {"architecture": "gated", "l1_coefficient": 0.02},
    "averaged, signum": {"architecture": "topk", "k": 4, "ema_decay": 0.9, "optimizer": "signum", "lr": 1e-3},
    "resampled": {"architecture": "topk", "k": 1, "feature_sampling_method": "anthropic"},
}


def config(**changes: Any) -> LanguageModelSAERunnerConfig:
    base = {"d_in": D, "expansion_factor": 4, "train_batch_size": ROWS, "dead_feature_window": 2, "lr": 3e-3}
    return LanguageModelSAERunnerConfig(**SMALL_RUN | base | {"total_training_tokens": STEPS * ROWS} | changes)


def batch(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(step)).to(dtype) * 3 + 1


def trained(changes: dict[str, Any], share: Share) -> dict[str, Any]:
    """What a trainer is after some steps: its metrics, its counters and its weights."""
    torch.manual_seed(0)
    cfg = config(**changes)
    trainer = SAETrainer(SparseAutoencoder(cfg), cfg, share)
    trainer.sae.b_enc.detach()[:4] = -30.0  # silent ones, which a remedy has to wake
    dtype, deal = trainer.sae.dtype, Deal(share, Peers(), ROWS, cfg.micro_batch_size or ROWS)
    metrics = []
    for step in range(STEPS):
        result = trainer.step(deal.own_of_batch(batch(step, dtype)), step)
        metrics.append(training_metrics(result, trainer.tracker, step))
        if step == 10 and cfg.feature_sampling_method:
            trainer.resample(batch(99, dtype), batch(99, dtype), step)
    weights = {name: value.clone() for name, value in trainer.sae.weights()}
    return {"metrics": metrics, "weights": weights, "tracker": trainer.tracker.state_dict()}


def trained_on_ranks(dtype: str) -> dict[str, Any]:
    share = Share(dist.get_rank(), dist.get_world_size())
    return {name: trained({**changes, "dtype": dtype}, share) for name, changes in CASES.items()}


def trained_by_dense_products(names: list[str]) -> dict[str, Any]:
    """By the way of devices that have no sparse one."""
    objective.has_sparse_way = lambda *_: False
    share = Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
    return {name: trained({**CASES[name], "dtype": "float64"}, share) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: trained({**changes, "dtype": "float64"}, ALONE) for name, changes in CASES.items()}


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(request.param, trained_on_ranks, "float64")


@pytest.mark.parametrize("name", CASES)
def test_processes_that_share_rows_make_the_steps_of_one(
    name: str, alone: dict[str, Any], shared: list[dict[str, Any]]
) -> None:
    check_same(alone[name], [of_rank[name] for of_rank in shared])


def test_so_they_do_without_sparse_products(alone: dict[str, Any]) -> None:
    names = ["ghost gradients", "topk, AuxK", "batchtopk", "matryoshka", "jumprelu, target_l0"]
    shared = on_ranks(2, trained_by_dense_products, names)
    for name in names:
        check_same(alone[name], [of_rank[name] for of_rank in shared])


def check_same(expected: dict[str, Any], of_ranks: list[dict[str, Any]]) -> None:
    found, *others = of_ranks
    for of_one, of_all in zip(expected["metrics"], found["metrics"], strict=True):
        assert of_all == pytest.approx(of_one, rel=1e-9, abs=1e-9)
    for counter, value in expected["tracker"].items():
        assert torch.equal(found["tracker"][counter], value), counter
    for weight, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][weight], value, rtol=1e-8, atol=1e-8)
    for other in others:  # every process has the same bits
        assert all(torch.equal(value, found["weights"][weight]) for weight, value in other["weights"].items())


def test_the_cases_meet_what_they_are_about(alone: dict[str, Any]) -> None:
    last = {name: of["metrics"][-1] for name, of in alone.items()}
    assert any(of["losses/ghost_grad_loss"] > 0 for of in alone["ghost gradients"]["metrics"])
    assert any(of["losses/ghost_grad_loss"] > 0 for of in alone["topk, AuxK"]["metrics"])
    assert last["batchtopk"]["metrics/l0"] == pytest.approx(4)
    assert alone["resampled"]["weights"]["W_dec"].shape == (4 * D, D)


def largest_of(values: list[float]) -> list[int]:
    share = Share(dist.get_rank(), dist.get_world_size())
    own = torch.tensor(values)[share.rank :: share.n]
    keys = torch.arange(len(values))[share.rank :: share.n]
    return keys[share.largest(own, keys, 3)].tolist()


def test_the_largest_of_all_processes_are_chosen_and_of_equal_ones_the_first() -> None:
    assert sorted(sum(on_ranks(3, largest_of, [1.0, 5.0, 2.0, 5.0, 2.0, 2.0, 0.5]), [])) == [1, 2, 3]
    assert sorted(sum(on_ranks(2, largest_of, [1.0, 5.0]), [])) == [0, 1]
