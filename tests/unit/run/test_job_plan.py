"""Plans of jobs on many GPUs: bytes and operations by hand, memory as a run plans it, and which way is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small import D_IN, D_SAE, N_LAYERS, VOCAB

from sae_training.activations_store import ActivationsStore
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.sweep import variants
from sae_training.language_model.load import load_language_model
from sae_training.language_model.sites import find_hook_site, find_sites, merged
from sae_training.language_model.sizes import LanguageModelSizes, blocks_run, sizes_of, width_of
from sae_training.lm_runner import deal_of
from sae_training.parallel import plan
from sae_training.parallel.division import division
from sae_training.parallel.plan import GIGA, Machines, Shape
from sae_training.run.job_plan import Job, best, kept_share, smallest, ways
from sae_training.run.memory_plan import Kind, plan_memory, step_bytes
from sae_training.run.plan_in_words import in_json, in_words

MACHINES = Machines(
    gpus=8, nodes=1, memory=80 * 2**30, flops_16=1e15, flops_32=1e14, bandwidth=3e12, interconnect=4e11, network=5e10,
    disk=2e9, efficiency=0.5,
)  # fmt: skip
SAE = Shape(d_in=8, d_out=8, d_sae=64, k=4, weights=4 * 1000, optimizer="adam", sparse=True, itemsize=4, active=4)


def lm_of(dtype: torch.dtype = torch.float32) -> LanguageModelSizes:
    return sizes_of("demo", {}, dtype)


@pytest.fixture
def job_of(small_config: Callable) -> Callable[..., Job]:
    def make(machines: Machines = MACHINES, **changes: Any) -> Job:
        cfg = small_config(**{"architecture": "topk", "device": "cpu", **changes})
        return Job(cfg, variants(cfg), lm_of(), machines)

    return make


def by_name(job: Job) -> dict[str, Any]:
    return {way.flags: way for way in ways(job)}


# ------------------------------------------------------------------------------------------------------- by hand


def test_bytes_between_ranks_by_hand() -> None:
    assert plan.rows_received(rows=100, width=8, itemsize=2, n=4) == 100 * 8 * 2 * 3 / 4
    assert plan.ring_all_reduce(1000, 4) == 1500
    assert plan.counts_reduced(64, 4) == 1.5 * 64 * 8
    assert plan.choice_of_batch_gathered(rows=100, k=4, n=4, sampled=True) == 3 * (100 / 4) * (2 * 4) * 4
    assert plan.choice_of_batch_gathered(rows=100, k=4, n=4, sampled=False) == 3 * 100 * 4 * 4
    assert plan.choice_of_rows_gathered(rows=100, k=4, n=4) == 3 * 100 * 4 * 4
    assert plan.reconstructions_reduced(rows=100, d_out=8, n=4) == 1.5 * 100 * 8 * 4


def test_what_one_rank_alone_receives_is_nothing() -> None:
    assert plan.rows_received(100, 8, 2, 1) == plan.ring_all_reduce(1000, 1) == 0
    assert plan.choice_of_batch_gathered(100, 4, 1, True) == plan.choice_of_rows_gathered(100, 4, 1) == 0
    assert plan.ring_seconds(1000, MACHINES, 1) == plan.all_to_all_seconds(1000, MACHINES, 1) == 0


def test_a_step_by_hand() -> None:
    dense = dataclasses.replace(SAE, sparse=False)
    assert plan.step_flops(SAE, 100) == 2 * 100 * 8 * 64
    assert plan.step_flops(dense, 100) == 12 * 100 * 8 * 64
    assert plan.step_traffic(SAE, 100) == 100 * (3 * 64 + 4 * 4 * 8) * 4 + 36 * 1000
    assert plan.step_traffic(dense, 100) == 100 * 9 * 64 * 4 + 36 * 1000
    seconds = (plan.step_flops(dense, 100) / 1e14 + plan.step_traffic(dense, 100) / 3e12) / 0.5
    assert plan.step_seconds(dense, 100, MACHINES) == pytest.approx(seconds)


def test_links_between_nodes_are_slower() -> None:
    two = dataclasses.replace(MACHINES, nodes=2)
    assert plan.ring_seconds(GIGA, MACHINES, 8) == pytest.approx(1 / 400 / 0.5)
    assert plan.ring_seconds(GIGA, two, 16) == pytest.approx(1 / 50 / 0.5)
    assert plan.all_to_all_seconds(15 * GIGA, two, 16) == pytest.approx(8 / 50 / 0.5)  # 8 of 15 are elsewhere


def test_a_group_that_straddles_two_nodes_has_the_slower_links() -> None:
    six = dataclasses.replace(MACHINES, gpus=6, nodes=2)  # of groups of four, the second has two GPUs of each node
    assert plan.ring_seconds(GIGA, six, 3) == pytest.approx(1 / 400 / 0.5)
    assert plan.ring_seconds(GIGA, six, 4) == pytest.approx(1 / 50 / 0.5)
    assert plan.all_to_all_seconds(3 * GIGA, six, 3) == pytest.approx(3 / 400 / 0.5)
    assert plan.all_to_all_seconds(3 * GIGA, six, 4) == pytest.approx(2 / 50 / 0.5)  # 2 of 3 are elsewhere
    assert plan.ring_seconds(GIGA, dataclasses.replace(six, nodes=1), 4) == pytest.approx(1 / 400 / 0.5)


# ------------------------------------------------------------------------------------------- the language model's sizes


def test_sizes_of_the_bundled_model(demo_model: Any) -> None:
    lm = lm_of()
    cfg = demo_model.cfg
    for name in ("n_layers", "d_model", "d_mlp", "n_heads", "d_head", "d_vocab"):
        assert getattr(lm, name) == getattr(cfg, name)
    assert (lm.n_layers, lm.d_model, lm.d_vocab) == (N_LAYERS, D_IN, VOCAB)
    assert lm.n_params == pytest.approx(sum(p.numel() for p in demo_model.parameters()), rel=0.01)


def test_sizes_of_a_model_that_is_only_listed() -> None:
    lm = sizes_of("meta-llama/Llama-3.1-8B", {}, torch.bfloat16)
    assert lm.n_params == pytest.approx(8.03e9, rel=0.001)
    assert lm.bytes == 2 * lm.n_params
    of_block = 4096 * 128 * 2 * (32 + 8) + 3 * 4096 * 14336
    assert lm.block_params == of_block
    assert lm.flops(2, 128) == 2 * (2 * of_block + 2 * 128 * 4096)


def test_sizes_that_are_given_need_no_name() -> None:
    lm = sizes_of("nobody/knows", {"d_model": 1024, "n_layers": 10, "n_params": 400_000_000}, torch.bfloat16)
    assert lm.n_params == 400_000_000
    assert lm.n_layers * lm.block_params == pytest.approx(lm.n_params - 2 * 128_000 * 1024, rel=1e-6)
    with pytest.raises(ValueError, match="n_params: found 1,000, expected more than"):
        sizes_of("nobody/knows", {"d_model": 1024, "n_layers": 10, "n_params": 1000}, torch.bfloat16)
    with pytest.raises(FileNotFoundError, match="model_name: found 'nobody/knows'.*give --d_model, --n_layers"):
        sizes_of("nobody/knows", {"n_params": 1000}, torch.bfloat16)


@pytest.mark.parametrize(
    "hook", ["hook_resid_post", "hook_mlp_out", "attn.hook_z", "attn.hook_k", "mlp.hook_post", "ln2.hook_normalized"]
)
def test_widths_of_hooks_are_those_of_the_model(hook: str, demo_model: Any) -> None:
    name = f"blocks.1.{hook}"
    assert width_of(name, lm_of()) == find_hook_site(demo_model, name).d_in
    assert blocks_run([name], lm_of()) == 2


# -------------------------------------------------------------------------------------------------------- whole plans


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k": [4, 8]},
        {"architecture": "standard"},
        {"ema_decay": 0.9, "optimizer": "signum"},
        {"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 2]},
    ],
)
def test_one_process_is_planned_as_a_run_plans_itself(
    changes: dict[str, Any], small_config: Callable, demo_model: Any
) -> None:
    cfg = small_config(**{"architecture": "topk", **changes})
    singles = variants(cfg)
    sites = merged(find_sites(single, demo_model) for single in singles.values())
    store = ActivationsStore(next(iter(singles.values())), demo_model, sites=sites)
    alone = ways(Job(cfg, singles, lm_of(), dataclasses.replace(MACHINES, gpus=1)))[0]
    assert alone.memory is not None
    assert alone.memory.parts == plan_memory(cfg, list(singles.values()), store).parts


def test_two_processes_are_planned_as_a_run_plans_itself(small_config: Callable) -> None:
    of_run = {"architecture": "topk", "device": "cpu", "train_batch_size": 64, "micro_batch_size": 32}
    cfgs = {name: small_config(parallel=name, **of_run) for name in ("data", "latents")}
    found = by_name(Job(cfgs["data"], variants(cfgs["data"]), lm_of(), dataclasses.replace(MACHINES, gpus=2)))
    planned = {name: found[f"--parallel {name}"].memory.parts for name in cfgs}
    assert on_ranks(2, parts_in_runs, cfgs) == [planned] * 2


def parts_in_runs(cfgs: dict[str, LanguageModelSAERunnerConfig]) -> dict[str, Any]:
    """Return what a rank of each run plans to hold."""
    model, planned = load_language_model("demo", lm_dtype="float32"), {}
    for name, cfg in cfgs.items():
        deal = deal_of(cfg, division(cfg.parallel, {"all": 1.0}))
        store = ActivationsStore(cfg, model, sites=find_sites(cfg, model), deal=deal)
        planned[name] = plan_memory(cfg, [cfg], store).parts
    return planned


def test_of_a_step_groups_divide_the_rows_that_are_computed_at_once(job_of: Callable) -> None:
    at_once = {}
    for size in (32, None):  # all 64 at once, or parts of 32
        job = job_of(architecture="jumprelu", train_batch_size=64, micro_batch_size=size)
        for name in ("one GPU", "--parallel data", "--parallel data,latents --mesh 4,2"):
            parts = {part.kind: part.bytes for part in by_name(job)[name].memory.parts}
            wide = 9 * D_IN + 9 * D_SAE // (2 if "mesh" in name else 1)  # tensors of rows, and of codes
            at_once[size, name] = (parts[Kind.STEP] - parts[Kind.WEIGHTS]) / wide / 4
    assert list(at_once.values()) == [32, 4, 8, 64, 8, 16]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_step_holds_the_candidates_of_all_ranks_that_share_latents(architecture: str, small_config: Callable) -> None:
    cfg = small_config(architecture=architecture, k=8, micro_batch_size=32)
    alone, shared = (step_bytes(cfg, 1000, mesh) for mesh in ((2, 1), (2, 4)))
    candidates = 4 * (32 // 2) * 8 if architecture == "topk" else 0  # of each row k, from each of four ranks
    assert shared - alone == candidates * (4 + 4 + 8 + 4)


def test_what_ranks_share_falls_with_their_number(job_of: Callable) -> None:
    found = by_name(job_of(hook_point="blocks.{layer}.hook_resid_post", hook_point_layer=list(range(N_LAYERS))))
    assert f"{N_LAYERS} autoencoders for 8 GPUs" in found["--parallel layers"].refused
    two = dataclasses.replace(MACHINES, gpus=2)
    found = by_name(job_of(two, hook_point="blocks.{layer}.hook_resid_post", hook_point_layer=[0, 1, 2, 3]))
    parts = {
        name: {part.kind.value: part.bytes for part in way.memory.parts} for name, way in found.items() if way.memory
    }
    alone = parts["one GPU"]
    for name in ("--parallel layers", "--parallel latents"):
        assert parts[name]["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)
        assert parts[name]["optimizer state"] == pytest.approx(alone["optimizer state"] / 2, rel=0.01)
    assert parts["--parallel data"]["weights"] == alone["weights"]
    assert parts["--parallel data"]["a training step"] < alone["a training step"]
    for way in found.values():
        assert way.passes == pytest.approx(found["one GPU"].passes / (1 if way.flags == "one GPU" else 2))
    rows = 64 * 4 * D_IN * 4  # of a step at four hooks, float32
    assert found["--parallel layers"].received == {"rows": rows / 2 / 2}
    weights = alone["weights"]
    assert found["--parallel data"].received == {
        "rows": rows / 2 / 2 * 2, "gradients": weights, "counts": 4 * D_SAE * 8, "choice": 0,
    }  # fmt: skip
    choice = 4 * 64 * 32 * 4  # k is 32 by default
    # A rank keeps half, of which half is another's; each of these rows is sent on once, and all that are kept elsewhere
    # come with their batch.
    assert found["--parallel latents"].received == {
        "rows": rows / 2 + rows / 2,
        "choice": choice,
        "reconstructions": rows,
    }
    assert parts["--parallel layers"]["buffer"] == pytest.approx(alone["buffer"] / 2, rel=0.01)
    places = 24 * 4 * 4 * 16
    assert parts["--parallel data"]["buffer"] == parts["--parallel latents"]["buffer"] == alone["buffer"] / 2 + places


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "standard"])
def test_a_choice_among_all_rows_is_sent_and_a_choice_by_row_is_not(architecture: str, job_of: Callable) -> None:
    job = job_of(dataclasses.replace(MACHINES, gpus=2), architecture=architecture)
    sent = 64 / 2 * 2 * job.cfg.k * 4 if architecture in ("batchtopk", "matryoshka") else 0
    assert by_name(job)["--parallel data"].received["choice"] == sent


def test_rows_of_a_cache_are_read_by_each_rank_and_not_sent(job_of: Callable, tmp_path: Any) -> None:
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path)}
    layers = {"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 1]}
    job = job_of(dataclasses.replace(MACHINES, gpus=2), **cached, **layers)
    found, rows = by_name(job), 64 * D_IN * 4
    assert found["--parallel data"].read == found["one GPU"].read == 2 * rows
    assert found["--parallel layers"].read == rows
    assert not any(way.received.get("rows") for way in found.values())
    # A node's disk, which gives 1e9 bytes/s, gives each row once: both hooks, or in `layers` those of the node's GPUs.
    apart = by_name(job_of(dataclasses.replace(MACHINES, gpus=1, nodes=2), **cached, **layers))
    assert {way.reading for way in found.values()} == {2 * rows / 1e9}
    assert {name: way.reading * 1e9 for name, way in apart.items()} == {name: 2 * rows for name in found} | {
        "--parallel layers": rows
    }
    assert all(way.tokens_per_s == 64 / (way.reading + way.step + way.exchange) for way in found.values())
    assert " reading " in in_words(job) and "disk 2.0 GB/s a node" in in_words(job)


def test_a_mesh_is_between_its_two_sides(job_of: Callable) -> None:
    found = by_name(job_of())
    meshes = ["--parallel data,latents --mesh 4,2", "--parallel data,latents --mesh 2,4"]
    assert [*found] == ["one GPU", "--parallel layers", "--parallel data", "--parallel latents", *meshes]
    weights = [found[name].memory.parts for name in ("--parallel data", *meshes, "--parallel latents")]
    held = [sum(part.bytes for part in parts if part.kind.value == "weights") for parts in weights]
    assert held == sorted(held, reverse=True)


def test_a_mesh_sends_within_groups_and_between_them(job_of: Callable) -> None:
    machines, name = dataclasses.replace(MACHINES, gpus=4), "--parallel data,latents --mesh 2,2"
    job = job_of(machines)
    row, weights = D_IN * 4, (D_SAE // 2 * (2 * D_IN + 2) + D_IN) * 4
    assert by_name(job)[name].received == {
        "rows": 16 * row * 3 / 4 * 2 + 32 * row / 2, "gradients": weights, "counts": D_SAE // 2 * 8,
        "choice": 32 * job.cfg.k * 4, "reconstructions": 32 * row,
    }  # fmt: skip
    of_batch = by_name(job_of(machines, architecture="batchtopk"))  # a choice among all rows and latents at once
    sent = {flags: way.received["choice"] for flags, way in of_batch.items() if "choice" in way.received}
    assert sent == dict.fromkeys(("--parallel data", "--parallel latents", name), 64 * 3 / 4 * 2 * job.cfg.k * 4)


def test_measured_rates_take_the_place_of_stated_ones(job_of: Callable) -> None:
    job = dataclasses.replace(job_of(dataclasses.replace(MACHINES, gpus=1)), lm_rate=100.0, step_rate=400.0)
    (alone,) = ways(job)
    assert (alone.passes, alone.step) == (pytest.approx(64 / 100), pytest.approx(64 / 400))
    assert alone.tokens_per_s == pytest.approx(80)


def test_positions_that_are_left_out_cost_passes_and_give_no_rows(small_config: Callable) -> None:
    assert kept_share(small_config(context_size=16)) == 1
    assert kept_share(small_config(context_size=16, exclude_special_tokens=True)) == 15 / 16
    assert kept_share(small_config(context_size=16, exclude_special_tokens=True, seqpos_slice=(8, None))) == 0.5


def test_nothing_fits_into_too_little_and_the_plan_says_what_would(job_of: Callable) -> None:
    wide = {"n_latents": 2**22, "k": 8, "eval_every_steps": 0, "device": "cuda"}
    tight = dataclasses.replace(MACHINES, gpus=2, memory=12 * 2**30)
    job = dataclasses.replace(job_of(tight, **wide), triton=True)
    assert best(ways(job)) is None
    more = smallest(job)
    assert more is not None and "latents" in more[1].parallel
    text = " ".join(in_words(job).split())
    assert (
        "Nothing fits. Least memory takes" in text and f"{more[0].nodes} nodes would do, with {more[1].flags}" in text
    )
    assert in_json(job)["best"] is None
    small = dataclasses.replace(job, machines=dataclasses.replace(tight, memory=2**30))
    assert "The language model alone takes 2.02 GiB of a GPU while it is loaded (float32)" in " ".join(
        in_words(small).split()
    )


def test_the_best_way_and_why(job_of: Callable) -> None:
    layers = {"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": [0, 1, 2, 3]}
    job = job_of(dataclasses.replace(MACHINES, gpus=4), **layers)
    chosen = best(ways(job))
    assert chosen is not None
    fitting = [way.tokens_per_s for way in ways(job) if way.fits]
    assert chosen.tokens_per_s >= 0.95 * max(fitting)
    told = in_json(job)
    assert told["best"]["parallel"] == chosen.parallel and "with" in told["best"]["why"]
    assert told["gpus"] == 4 and len(told["ways"]) == 5
    assert D_SAE == 2 * D_IN and f"topk {D_IN} x {D_SAE}" in in_words(job)


def test_of_ways_that_are_as_fast_the_simpler_one_is_chosen(job_of: Callable) -> None:
    found = ways(job_of(dataclasses.replace(MACHINES, gpus=4)))
    rates = {"one GPU": 50.0, "data": 97.0, "latents": 100.0, "data,latents": 100.0}
    made = [dataclasses.replace(way, tokens_per_s=rates.get(way.parallel, 0.0)) for way in found]
    chosen = best(made)
    assert chosen is not None and chosen.parallel == "data"
