"""Processes that hold the latents of one dictionary together make the steps of one, up to the order of sums."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_shared_rows import CASES, ROWS, STEPS, D, batch, config

from sae_training.parallel.deal import Deal
from sae_training.parallel.division import division, on_mesh
from sae_training.parallel.ranks import n_ranks
from sae_training.parallel.shard import WHOLE, Shard
from sae_training.parallel.share import Share
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


def trained(changes: dict[str, Any], share: Share, shard: Shard) -> dict[str, Any]:
    """What a trainer is after some steps: its metrics, its counters, and its weights on held-out rows."""
    torch.manual_seed(0)
    cfg = config(**changes)
    trainer = SAETrainer(sae := SparseAutoencoder(cfg, shard=shard), cfg, share)
    first, last = (sae.shard.below(latent) for latent in (SILENT.start, SILENT.stop))
    sample = batch(98, sae.dtype)
    if sae.is_transcoder:
        sae.initialize_transcoder(sample, sample.flip(1), "mean")
    else:
        sae.initialize_b_dec(sample, "mean")
    said = start_thresholds(sae, sample)
    sae.b_enc.detach()[first:last] = -30.0
    metrics, deal = [], Deal(share, shard, ROWS, cfg.micro_batch_size or ROWS)
    for step in range(STEPS):
        x = deal.own_of_batch(batch(step, sae.dtype))
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


def trained_on_ranks(names: list[str], groups: int = 1, dense: bool = False) -> dict[str, Any]:
    if dense:  # by the way of devices that have no sparse one
        objective.has_sparse_way = lambda *_: False
    parts = on_mesh(groups, n_ranks() // groups)
    return {name: trained({**ALL[name], "dtype": "float64"}, *parts) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return trained_on_ranks([*ALL])


@pytest.fixture(scope="module", params=[(1, 3), (2, 2)], ids=["3 ranks", "2 groups of 2"])
def sharded(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """What each rank of each group has trained. The ranks of a group share the latents, the groups the rows."""
    groups, of_group = request.param
    return on_groups(groups, of_group, [*ALL])


def on_groups(groups: int, of_group: int, names: list[str], dense: bool = False) -> list[list[dict[str, Any]]]:
    found = on_ranks(groups * of_group, trained_on_ranks, names, groups, dense)
    return [found[first : first + of_group] for first in range(0, len(found), of_group)]


@pytest.mark.parametrize("name", ALL)
def test_processes_that_share_latents_make_the_steps_of_one(
    name: str, alone: dict[str, Any], sharded: list[list[dict[str, Any]]]
) -> None:
    for group in sharded:
        check_same(alone[name], [of_rank[name] for of_rank in group])
        check_copies([of_rank[name] for of_rank in group], [of_rank[name] for of_rank in sharded[0]])


def test_so_they_do_without_sparse_products(alone: dict[str, Any]) -> None:
    for group in on_groups(2, 2, DENSE, True):
        for name in DENSE:
            check_same(alone[name], [of_rank[name] for of_rank in group])


def trained_where_groups_round_otherwise(names: list[str]) -> dict[str, Any]:
    """As where a network adds in another order in each group: sums of some groups differ in their last bits."""
    (share, shard), all_reduce = on_mesh(2, 2), dist.all_reduce
    others = [shard.group] * share.rank + [share.group] * shard.rank

    def rounded(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        all_reduce(tensor, op, group)
        if op == dist.ReduceOp.SUM and tensor.is_floating_point() and any(group is other for other in others):
            tensor.mul_(1 + 1e-15)
        return SimpleNamespace(wait=lambda: None)

    dist.all_reduce = rounded
    return {name: trained({**ALL[name], "dtype": "float64"}, share, shard) for name in names}


def test_copies_are_the_same_where_groups_round_otherwise() -> None:
    names = ["topk", "transcoder", "batchtopk"]
    first, *others = on_ranks(4, trained_where_groups_round_otherwise, names)
    for name in names:
        states = [of_rank[name]["state"] for of_rank in (first, *others)]
        check_copies([of_rank[name] for of_rank in others[1:]], [first[name], others[0][name]])
        assert all(torch.equal(state["weights"]["b_dec"], states[0]["weights"]["b_dec"]) for state in states)


def check_same(expected: dict[str, Any], of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        for of_one, of_all in zip(expected["metrics"], found["metrics"], strict=True):
            assert of_all == pytest.approx(of_one, rel=1e-9, abs=1e-9)
        assert found["said"] == expected["said"]
        assert torch.equal(found["log_frequency"], expected["log_frequency"])
        torch.testing.assert_close(found["out"], expected["out"], rtol=1e-8, atol=1e-8)
        assert found["metrics"] == of_ranks[0]["metrics"]
    check_state(expected["state"], [found["state"] for found in of_ranks])


def check_copies(group: list[dict[str, Any]], first_group: list[dict[str, Any]]) -> None:
    """Ranks of two groups that hold the same latents have the same bits."""
    for found, expected in zip(group, first_group, strict=True):
        for part, tensors in expected["state"].items():
            assert all(torch.equal(found["state"][part][name], value) for name, value in tensors.items()), part


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
    shard = on_mesh(1, n_ranks())[1].over(len(values[0]))
    return shard.among_largest(torch.tensor(values)[:, shard.own], k).tolist()


def test_of_equal_values_the_lowest_latents_are_chosen() -> None:
    rows = [[1.0, 5.0, 2.0, 5.0, 2.0, 2.0, 0.5], [0.0] * 7, [float("nan"), 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    found = [sum(parts, []) for parts in zip(*on_ranks(3, chosen, rows, 3), strict=True)]
    assert [[i for i, is_chosen in enumerate(row) if is_chosen] for row in found] == [[1, 2, 3], [0, 1, 2], [0, 5, 6]]


def refusals(*meshes: tuple[int, int]) -> list[str]:
    found = []
    for mesh in meshes:
        with pytest.raises(ValueError, match="mesh: ") as caught:
            division("data,latents", {}, mesh)
        found.append(str(caught.value))
    return found


def test_a_mesh_of_another_number_of_ranks_is_refused() -> None:
    for found in on_ranks(2, refusals, (2, 3)):
        assert found == [
            "mesh: found 2,3, for 6 processes, with 2, expected 2,1 or 1,2; give one to the command that began the "
            "run, or start 6 processes (--nproc_per_node)."
        ]
    assert division("data,latents", {}, (2, 3)).shard.is_all  # of one process


def test_more_ranks_than_pairs_of_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel: found 3 ranks for 5 latents, expected half as many at most"):
        Shard(0, 3).over(5)


def test_a_part_is_not_saved_as_if_it_were_all(tmp_path: Path) -> None:
    sae = SparseAutoencoder(config(), shard=Shard(1, 3))
    with pytest.raises(ValueError, match="this process holds latents 10 to 20 of 32"):
        sae.save_model(tmp_path / "part")
    assert not (tmp_path / "part").exists()
