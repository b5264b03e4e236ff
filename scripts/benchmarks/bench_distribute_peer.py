"""One process of eai-sparsify's own training with `distribute_modules`, in its environment, for `bench_distribute.py`.

torchrun starts it with one JSON object as its word:

    {"model": FOLDER, "ids": FOLDER, "hookpoints": [...], "expansion_factor": 8, "k": 32, "sequences": 16, "steps": 20,
     "out": FOLDER}

`ids`: a data set of contexts, of which `sequences` are a step of all processes. sparsify's command line joins by NCCL,
on CUDA devices alone. So its Trainer is called here as that command line does it, with gloo, each rank having every
n-th context.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    given: dict[str, Any] = json.loads(sys.argv[1])
    from datasets import load_from_disk
    from sparsify import SparseCoderConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]
    from transformers import AutoModel

    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    model = AutoModel.from_pretrained(given["model"], dtype=torch.float32)
    contexts = load_from_disk(given["ids"]).select(range(given["sequences"] * given["steps"]))  # pyright: ignore
    dataset = contexts.shard(n, rank).with_format("torch")
    torch.cuda.is_bf16_supported = lambda *_: False  # pyright: ignore  # it asks a device that is not there
    cfg = TrainConfig(
        SparseCoderConfig(expansion_factor=given["expansion_factor"], k=given["k"]),
        batch_size=given["sequences"] // n, optimizer="adam", lr_warmup_steps=0, hookpoints=given["hookpoints"],
        distribute_modules=True, save_every=10**9, log_to_wandb=False, run_name=given["out"],
    )  # fmt: skip
    os.chdir(os.path.dirname(given["out"]))
    Trainer(cfg, dataset, model).fit()
    if rank == 0:
        print(json.dumps({"sparsify": version("eai-sparsify"), "torch": torch.__version__}))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
