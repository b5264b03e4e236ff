"""Times training steps on a device, the sparse and the dense way, against the encoder's product; eai-sparsify's too.

Needs torch, numpy and safetensors; eai-sparsify comes from `gpu_check.py --wheels`. Weights are float32 master weights,
batches are `bench_workers.planted_batches`, no remedy for dead latents is on, and the learning rate is so small that
nothing changes over the steps. `over_encoder` is a step's time over that of one product (batch, d_in) @ (d_in, d_sae)
in bfloat16 into memory that is there already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from scripts.benchmarks.bench_workers import BUILDERS, LR, Sizes, planted_batches
from scripts.benchmarks.gpu_parts import Figures, Items, Skip, forget_peak, median_ms, peak_gib

SIZES: dict[str, dict[str, Any]] = {
    "768": {"d_in": 768, "d_sae": 24_576, "batch": 16_384, "k": 32},
    "4096": {"d_in": 4_096, "d_sae": 131_072, "batch": 8_192, "k": 64},
}
TINY: dict[str, dict[str, Any]] = {
    "768": {"d_in": 16, "d_sae": 1_024, "batch": 64, "k": 2},
    "4096": {"d_in": 32, "d_sae": 2_048, "batch": 48, "k": 3},
}
STEPS = (
    ("topk", "sparse", {}),
    ("topk", "dense", {}),
    ("batchtopk", "sparse", {}),
    ("batchtopk", "dense", {}),
    ("standard", "sparse", {}),
    ("standard", "dense", {}),
    ("topk", "sparse", {"dtype": "bfloat16"}),
    ("topk", "dense", {"dtype": "bfloat16"}),
    ("batchtopk", "dense", {"dtype": "bfloat16"}),
    ("standard", "dense", {"dtype": "bfloat16"}),
    ("topk", "dense", {"tf32": True}),
)
"""Architecture, way, and what differs from a default config: TF32 products are torch's setting, not ours."""


def items(name: str, device: torch.device) -> Items:
    at = "768" if name == "sparsify" else name.removeprefix("steps-")
    sizes = Sizes(l0=0, device=str(device), **(TINY if device.type == "cpu" else SIZES)[at])
    bench = Bench(sizes, device)
    found: Items = {f"encoder product {dtype}": partial(bench.encoder, dtype) for dtype in ("bfloat16", "float32")}
    if name == "sparsify":
        return found | {f"eai-sparsify {kind}": partial(bench.sparsify, kind) for kind in ("topk-adam", "topk-signum")}
    from sae_training.training.trainer import SAETrainer  # noqa: F401 - what is missing is then said once

    for architecture, way, changes in STEPS:
        label = " ".join([architecture, way, *(key if value is True else str(value) for key, value in changes.items())])
        found[label] = partial(bench.step, architecture, way, changes)
    return found


class Bench:
    """The batches of one size, and what the encoder's product takes at it."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.batches = cache(partial(planted_batches, sizes))
        self.encoder_ms = cache(self.time_encoder)

    def encoder(self, dtype: str) -> Figures:
        forget_peak(self.device)
        ms = self.encoder_ms(dtype)
        sizes = self.sizes
        flops = 2 * sizes.batch * sizes.d_in * sizes.d_sae
        return self.about() | {"ms": round(ms, 3), "tflop_per_s": round(flops / ms / 1e9, 1)}

    def time_encoder(self, dtype: str) -> float:
        x = self.batches()[0].to(getattr(torch, dtype))
        W_enc = torch.randn(self.sizes.d_in, self.sizes.d_sae, device=self.device, dtype=x.dtype)
        out = torch.empty(self.sizes.batch, self.sizes.d_sae, device=self.device, dtype=x.dtype)
        return median_ms(lambda: torch.mm(x, W_enc, out=out), self.device)

    def about(self) -> Figures:
        return {name: getattr(self.sizes, name) for name in ("d_in", "d_sae", "batch", "k")}

    def step(self, architecture: str, way: str, changes: dict[str, Any]) -> Figures:
        """Time the step of ours; Skip if the sparse way is asked for and the package takes the dense one."""
        from sae_training.kernels import triton_products
        from sae_training.sparse_autoencoder import SparseAutoencoder
        from sae_training.training.trainer import SAETrainer

        os.environ["SAE_TRAINING_TRITON"] = "1" if way == "sparse" else "0"
        triton_products.available.cache_clear()
        tf32 = changes.get("tf32", False)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cfg = self.config(architecture, {name: value for name, value in changes.items() if name != "tf32"})
        before = torch.cuda.memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        forget_peak(self.device)
        with weights_on(self.device):
            sae = SparseAutoencoder(cfg)
        trainer = SAETrainer(sae, cfg)
        steps = count()
        code: Any = trainer.step(self.batches()[0], next(steps)).out.code
        is_sparse, l0 = code.entries is not None, code.l0().item()
        del code
        if self.device.type == "cuda" and is_sparse != (way == "sparse"):
            raise Skip(f"{architecture} has no {way} way on this device: the step took the other one")
        ms = median_ms(lambda: trainer.step(self.next_batch(steps), 1), self.device)
        trainer.check_finite()
        figures = self.figures(ms) | {"sparse": is_sparse, "l0": round(l0, 1)}
        if self.device.type == "cuda":
            weights = sum(p.numel() * p.element_size() for p in sae.parameters()) / 2**30
            figures |= {"peak_gib": round((peak_gib(self.device) or 0.0) - before, 3), "weights_gib": round(weights, 3)}
        return figures

    def next_batch(self, steps: Any) -> Tensor:
        batches = self.batches()
        return batches[next(steps) % len(batches)]

    def figures(self, ms: float) -> Figures:
        return self.about() | {"ms": round(ms, 3), "over_encoder": round(ms / self.encoder_ms("bfloat16"), 3)}

    def config(self, architecture: str, changes: dict[str, Any]) -> Any:
        from sae_training.config import LanguageModelSAERunnerConfig

        sizes = self.sizes
        return LanguageModelSAERunnerConfig(
            d_in=sizes.d_in,
            expansion_factor=sizes.d_sae // sizes.d_in,
            architecture=architecture,  # pyright: ignore[reportArgumentType]
            k=sizes.k,
            train_batch_size=sizes.batch,
            total_training_tokens=1000 * sizes.batch,
            n_batches_in_buffer=-(-2 * sizes.batch // (32 * 128)),
            store_batch_size=32,
            context_size=128,
            lr=LR,
            lr_warm_up_steps=0,
            device=str(self.device),
            log_to_wandb=False,
            **changes,
        )

    def sparsify(self, architecture: str) -> Figures:
        forget_peak(self.device)
        if self.device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its own switch, read when it is imported
        system = BUILDERS["eai-sparsify"](architecture, self.sizes)
        steps = count()
        ms = median_ms(lambda: system.step(self.next_batch(steps)), self.device)
        return self.figures(ms) | {"peak_gib": peak_gib(self.device), "version": system.version}


def weights_on(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, initial weights are drawn on the device: 131,072 x 4,096 of them take a CPU half a minute."""

    def draw(empty: Tensor, **_: Any) -> Tensor:
        return torch.randn(empty.shape, device=device).div_(empty.shape[1] ** 0.5)

    draw_there: Callable[..., Tensor] = draw
    return patch.object(torch.nn.init, "kaiming_uniform_", draw_there)
