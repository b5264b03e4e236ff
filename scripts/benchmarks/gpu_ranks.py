"""Several processes' work with one process: the group that torchrun's job makes (NCCL on a GPU), and its collectives.

A job of one process asks nobody, so here it is told not to know that it is all there is (`Peers.is_all`). Then each
collective of a step goes through NCCL, with its types, its sizes and its streams, and must give back what it was given.
What one GPU cannot show: bytes between GPUs, the order of sums, rows that are sent from process to process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from sae_training.parallel import ranks
from sae_training.parallel.peers import Peers
from sae_training.parallel.shard import Shard
from sae_training.parallel.share import Share
from scripts.benchmarks.gpu_parts import Figures, Items

SUMMED = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32)
"""What the processes of a run add up: weights, moments and figures, codes, counts, flags."""


def items(name: str, device: torch.device) -> Items:
    runs: Items = {f"a run with --parallel {how}": partial(same_run, device, how) for how in ("data", "latents")}
    return {"collectives": partial(collectives, device), **runs}


@contextlib.contextmanager
def job_of_one() -> Iterator[None]:
    """In here this process takes itself for one of several that torchrun has started, though it is the only one."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with (
        patch.dict(os.environ, job),
        patch.object(ranks, "is_launched", lambda: True),
        patch.object(Peers, "is_all", False),
    ):
        yield


def collectives(device: torch.device) -> Figures:
    """Call what processes that share rows or latents call, in all types, and compare with what one process has."""
    cfg = SimpleNamespace(device=device.type, parallel_timeout_minutes=2)
    with job_of_one(), ranks.joined(cfg):
        rows = torch.randn(64, 32, device=device)
        for dtype in SUMMED:
            of_type = (100 * rows).to(dtype)
            for peers in (Share(0, 1), Shard(0, 1)):
                same(peers.summed(of_type), of_type)
                same(peers.least(of_type), of_type)
                same(peers.gathered(of_type), of_type)
        of_ranks(rows)
        backend = dist.get_backend()
        work = dist.all_reduce(gradient := rows.T.contiguous(), async_op=True)  # as the exchange of gradients does
        assert work is not None
        work.wait()
        same(gradient, rows.T)
        ranks.exchanged([[]], [[]])
        ranks.wait_for_all()
        told = dist.get_backend(ranks.CONTROL[0])
    assert not dist.is_initialized()
    return {"tensors": backend, "control": told, "device": rows.device.type}


def of_ranks(rows: Tensor) -> None:
    """Check the choices and the gradients of processes that share latents, for `rows` (n, candidates)."""
    shard, share = Shard(0, 1).over(rows.shape[1]), Share(0, 1)
    best = torch.zeros_like(rows, dtype=torch.bool).scatter(1, rows.topk(4, dim=1).indices, True)
    same(shard.among_largest(rows, 4), best)
    same(shard.any(rows > 3), rows > 3)
    same(shard.greatest(rows), rows)
    flat = rows.flatten()
    found = share.largest(flat, torch.arange(len(flat), device=rows.device), 10)
    same(found, flat.topk(10).indices.sort().values)
    same(share.mean(rows.mean(), len(rows)), rows.mean())
    weights = rows.clone().requires_grad_()
    (shard.added(weights) * shard.lent(weights)).sum().backward()
    assert weights.grad is not None
    same(weights.grad, 2 * rows)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def same_run(device: torch.device, how: str) -> Figures:
    """Train the demo's autoencoder without a group and in one, and compare the weights.

    In float64: in float32 sums that round otherwise may choose other latents.
    """
    from sae_training.language_model.load import model_of
    from scripts.benchmarks.gpu_runs import QUIET, timed_run
    from scripts.demo import demo_config

    changes: dict[str, Any] = {"architecture": "batchtopk" if how == "data" else "topk", "expansion_factor": 2}
    changes |= {"total_training_tokens": 1_024, "train_batch_size": 128, "n_batches_in_buffer": 4, "n_eval_batches": 0}
    changes |= {"eval_every_steps": 0, "store_batch_size": 4, "context_size": 64}
    changes |= {"dead_feature_window": 2, "dtype": "float64", "device": device.type, "parallel": how, **QUIET}
    cfg, weights = dataclasses.replace(demo_config(), **changes), []
    model = model_of(cfg)
    timed_run(cfg, model, device, weights)
    with job_of_one():
        figures = timed_run(cfg, model, device, weights)
    first, second = weights
    largest = max((first[name] - second[name]).abs().max().item() for name in first)
    assert largest < 1e-9, f"the weights differ by {largest:.3g} from those of one process without a group"
    return {"steps": figures["steps"], "largest_difference": largest}
