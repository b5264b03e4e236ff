"""Processes that hold the latents of one dictionary together make the steps of one, up to the order of sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_shared_rows import CASES, STEPS, D, batch, config

from sae_training.parallel.shard import WHOLE, Shard
from sae_training.sparse_autoencoder import SparseAutoencoder, start_values
from sae_training.training import objective
from sae_training.training.metrics import training_metrics
from sae_training.training.thresholds import start_thresholds
from sae_training.training.trainer import SAETrainer

MORE: dict[str, dict[str, Any]] = {
    "matryoshka, topk": {"architecture": "matryoshka", "k": 4, "matryoshka_selection": "topk"},
    "jumprelu, tanh": {"architecture": "jumprelu", "l1_coefficient": 0.02, "jumprelu_sparsity_loss_mode": "tanh"},
    "transcoder": {
        "architecture": "topk",
        "k": 4,
        "target_hook_point": "blocks.1.hook_mlp_out",
        "d_out": D,
        "skip_connection": True,
        "feature_sampling_method": "l2",
    },
    "gated, resampled": {"architecture": "gated", "l1_coefficient": 0.1, "feature_sampling_method": "l2"},
    "jumprelu, resampled": {"architecture": "jumprelu", "l1_coefficient": 0.2, "feature_sampling_method": "l2"},
}
ALL = CASES | MORE
DENSE = ["ghost gradients", "topk, AuxK", "multi-topk", "batchtopk", "matryoshka", "gated", "jumprelu, target_l0"]
SILENT = slice(0, 4)  # latents that a remedy has to wake: of three ranks, two have none


def trained(changes: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """What a trainer is after some steps: its metrics, its counters, and its weights on held-out rows."""
    torch.manual_seed(0)
    cfg = config(**changes)
    trainer = SAETrainer(sae := SparseAutoencoder(cfg, shard=shard), cfg)
    first, last = (sae.shard.below(latent) for latent in (SILENT.start, SILENT.stop))
    sample = batch(98, sae.dtype)
    if sae.is_transcoder:
        sae.initialize_transcoder(sample, sample.flip(1), "mean")
    else:
        sae.initialize_b_dec(sample, "mean")
    said = start_thresholds(sae, sample)
    sae.b_enc.detach()[first:last] = -30.0
    metrics = []
    for step in range(STEPS):
        x = batch(step, sae.dtype)
        result = trainer.step(x, step, x.flip(1) if sae.is_transcoder else None)
        metrics.append(training_metrics(result, trainer.tracker, step))
        if step == 10 and cfg.feature_sampling_method:
            metrics.append({"resampled": trainer.resample(batch(99, sae.dtype), batch(99, sae.dtype), step)})
    trainer.check_weights()
    trainer.take_average()
    return {
        "metrics": metrics,
        "said": said,
        "state": trainer.state_dict(),
        "log_frequency": trainer.tracker.log_frequency(),
        "out": sae.eval().reconstruct(batch(100, sae.dtype)),
    }


def own_shard() -> Shard:
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def trained_on_ranks(names: list[str], dense: bool = False) -> dict[str, Any]:
    if dense:  # by the way of devices that have no sparse one
        objective.has_sparse_way = lambda *_: False
    return {name: trained({**ALL[name], "dtype": "float64"}, own_shard()) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return trained_on_ranks([*ALL])


@pytest.fixture(scope="module", params=[2, 3])
def sharded(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(request.param, trained_on_ranks, [*ALL])


@pytest.mark.parametrize("name", ALL)
def test_processes_that_share_latents_make_the_steps_of_one(
    name: str, alone: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    check_same(alone[name], [of_rank[name] for of_rank in sharded])


def test_so_they_do_without_sparse_products(alone: dict[str, Any]) -> None:
    sharded = on_ranks(2, trained_on_ranks, DENSE, True)
    for name in DENSE:
        check_same(alone[name], [of_rank[name] for of_rank in sharded])


def check_same(expected: dict[str, Any], of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        for of_one, of_all in zip(expected["metrics"], found["metrics"], strict=True):
            assert of_all == pytest.approx(of_one, rel=1e-9, abs=1e-9)
        assert found["said"] == expected["said"]
        assert torch.equal(found["log_frequency"], expected["log_frequency"])
        torch.testing.assert_close(found["out"], expected["out"], rtol=1e-8, atol=1e-8)
        assert found["metrics"] == of_ranks[0]["metrics"]
    check_state(expected["state"], [found["state"] for found in of_ranks])


def check_state(expected: dict[str, dict[str, torch.Tensor]], of_ranks: list[dict[str, Any]]) -> None:
    """The ranks' tensors, one after the other, are those of one process; or each has the same bits."""
    for part, tensors in expected.items():
        for name, value in tensors.items():
            found = [state[part][name] for state in of_ranks]
            if found[0].shape == value.shape:
                assert all(torch.equal(each, found[0]) for each in found), name
                torch.testing.assert_close(found[0], value, rtol=1e-8, atol=1e-8)
            else:
                axis = next(i for i, n in enumerate(found[0].shape) if n != value.shape[i])
                torch.testing.assert_close(torch.cat(found, dim=axis), value, rtol=1e-8, atol=1e-8)


def test_the_cases_meet_what_they_are_about(alone: dict[str, Any]) -> None:
    for name in ("ghost gradients", "topk, AuxK"):
        assert any(of.get("losses/ghost_grad_loss", 0) > 0 for of in alone[name]["metrics"])
    for name in ("resampled", "gated, resampled", "jumprelu, resampled", "transcoder"):
        assert any(of.get("resampled", 0) > 0 for of in alone[name]["metrics"]), name


@pytest.mark.parametrize(("architecture", "is_transcoder"), [("standard", False), ("topk", False), ("topk", True)])
def test_shards_start_with_their_part_of_the_same_random_weights(
    architecture: str, is_transcoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start_values.initial_weights(D, WHOLE.over(100), 6, architecture, is_transcoder, 3)
    monkeypatch.setattr(start_values, "DRAWN_AT_ONCE", 50)  # so that it is drawn in pieces
    shards = [
        start_values.initial_weights(D, Shard(rank, 3).over(100), 6, architecture, is_transcoder, 3)
        for rank in range(3)
    ]
    assert torch.equal(torch.cat([W_enc for W_enc, _ in shards], dim=1), whole[0])
    assert torch.equal(torch.cat([W_dec for _, W_dec in shards]), whole[1])


def chosen(values: list[list[float]], k: int) -> list[list[bool]]:
    shard = own_shard().over(len(values[0]))
    return shard.among_largest(torch.tensor(values)[:, shard.own], k).tolist()


def test_of_equal_values_the_lowest_latents_are_chosen() -> None:
    rows = [[1.0, 5.0, 2.0, 5.0, 2.0, 2.0, 0.5], [0.0] * 7, [float("nan"), 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    found = [sum(parts, []) for parts in zip(*on_ranks(3, chosen, rows, 3), strict=True)]
    assert [[i for i, is_chosen in enumerate(row) if is_chosen] for row in found] == [[1, 2, 3], [0, 1, 2], [0, 5, 6]]


def test_more_ranks_than_pairs_of_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel: found 3 ranks for 5 latents, expected half as many at most"):
        Shard(0, 3).over(5)


def test_a_part_is_not_saved_as_if_it_were_all(tmp_path: Path) -> None:
    sae = SparseAutoencoder(config(), shard=Shard(1, 3))
    with pytest.raises(ValueError, match="this process holds latents 10 to 20 of 32"):
        sae.save_model(tmp_path / "part")
    assert not (tmp_path / "part").exists()
