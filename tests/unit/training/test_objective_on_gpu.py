"""The sparse way as a GPU takes it, against the dense one: on a GPU, in Triton's interpreter, and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_helpers import (
    needs_gpu,
    needs_triton,
    only_once,
)

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.kernels import triton_products
from sae_training.kernels.sparse_code import Entries, keys_of
from sae_training.kernels.triton_products import INTERPRETED
from sae_training.sparse_autoencoder import SparseAutoencoder
from sae_training.sparse_autoencoder.losses import Coefficients
from sae_training.training import objective as objective_module
from sae_training.training.objective import dead_entries_of_all, objective

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
D_IN, WIDE, K, ROWS = 6, 240, 3, 40
CASES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk"},
    "topk multi": {"architecture": "topk", "multi_topk": True},
    "matryoshka topk": {"architecture": "matryoshka", "matryoshka_widths": (40, 100), "matryoshka_selection": "topk"},
}
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {},
    "auxk": {"auxk_coefficient": 0.5, "auxk_k": 20},
    "ghost": {"use_ghost_grads": True},
}
FEW, MANY = torch.arange(WIDE) % 24 == 0, torch.arange(WIDE) % 5 == 0  # dead ones: fewer and more than auxk_k


def autoencoder(device: torch.device, dtype: str, d_in: int = D_IN, **options: Any) -> Any:
    cfg = LanguageModelSAERunnerConfig(
        d_in=d_in,
        expansion_factor=WIDE // d_in,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        encoder_matmul_dtype="auto" if dtype == "float64" else dtype,  # pyright: ignore[reportArgumentType]
        device=device.type,
        train_batch_size=ROWS,
        **{"k": K, **options},
    )
    sae = SparseAutoencoder(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.device, parameter.dtype))
    return sae


def losses_and_gradients(sae: Any, dead: Tensor | None, sparse: bool) -> dict[str, Tensor]:
    sae.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    x = (2 * torch.randn(ROWS, sae.d_in, generator=generator) + 0.3).to(sae.device, sae.dtype)
    losses = (objective if sparse else SparseAutoencoder.losses)(sae, x, x, Coefficients(0.03, sae.k), dead)
    assert (losses.code.entries is not None) == sparse
    losses.loss.backward()
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
    return {"sae_out": losses.sae_out, "loss": losses.loss, "remedy": losses.ghost_grad_loss} | gradients


@only_once
@pytest.mark.parametrize("dead", [FEW, MANY], ids=["few dead", "many dead"])
@pytest.mark.parametrize("case", CASES)
def test_auxk_without_asking_which_latents_are_dead(case: str, dead: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = autoencoder(torch.device("cpu"), "float64", **CASES[case], **REMEDIES["auxk"])
    dense = losses_and_gradients(sae, dead, sparse=False)
    monkeypatch.setattr(objective_module, "dead_entries", dead_entries_of_all)
    sparse = losses_and_gradients(sae, dead, sparse=True)
    assert sparse["remedy"] > 0
    torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-12)


class NoWaiting(TorchDispatchMode):
    """Refuses what on a GPU would wait for it: reading a number, and results whose size depends on the data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "repeat_interleave", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index")) and len(args) > 1 else []
        masked = isinstance(indices, list | tuple) and any(i is not None and i.dtype == torch.bool for i in indices)
        if masked or name.startswith(self.REFUSED):
            raise RuntimeError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


@only_once
@pytest.mark.parametrize("remedy", ["none", "auxk"])
@pytest.mark.parametrize("case", CASES)
def test_the_way_on_a_gpu_reads_nothing_off_the_device(case: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the parts that differ there put in; the products themselves are `triton_products`'."""
    monkeypatch.setattr(objective_module, "dead_entries", dead_entries_of_all)
    monkeypatch.setattr(SparseAutoencoder, "to_revive", lambda self, dead: dead)
    monkeypatch.setattr(Entries, "rows", property(lambda self: keys_of(self.offsets, len(self.latents))))
    sae = autoencoder(torch.device("cpu"), "float64", **CASES[case], **REMEDIES[remedy])
    x = torch.randn(ROWS, D_IN, dtype=torch.float64)
    with NoWaiting():
        dead = None if remedy == "none" else MANY
        losses = objective(sae, x, x, Coefficients(0.0, K), dead)
        losses.loss.backward()
        losses.code.counts()
    assert losses.code.entries is not None
    with pytest.raises(RuntimeError, match="would wait"), NoWaiting():
        x[x > 0]


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 (see test_kernels_in_the_interpreter)")
@pytest.mark.parametrize("case", [*CASES, "batchtopk"])
def test_the_sparse_way_equals_the_dense_way_in_the_interpreter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "dead_entries", dead_entries_of_all)
    options = CASES.get(case, {"architecture": case})
    sae = autoencoder(torch.device("cpu"), "float32", **options, **REMEDIES["auxk"])
    assert triton_products.supports(sae.W_dec)
    dense, sparse = (losses_and_gradients(sae, MANY, sparse) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def no_waiting() -> Iterator[Any]:
    """Makes operations that wait for the device errors, once called."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("case", CASES)
def test_the_sparse_way_equals_the_dense_way_on_a_gpu(case: str, remedy: str) -> None:
    sae = autoencoder(torch.device("cuda"), "float32", **CASES[case], **REMEDIES[remedy])
    sae.k = 1  # so that d_sae / 4 k is large enough for the sparse way
    dead = None if remedy == "none" else MANY.cuda()
    dense, sparse = (losses_and_gradients(sae, dead, sparse) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    again = losses_and_gradients(sae, dead, sparse=True)
    for name, value in sparse.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("case", CASES)
def test_the_sparse_way_never_waits_for_the_gpu(case: str, remedy: str, dtype: str, no_waiting: Any) -> None:
    sae = autoencoder(torch.device("cuda"), dtype, **CASES[case], **REMEDIES[remedy])
    x, dead = torch.randn(ROWS, D_IN, device="cuda", dtype=sae.dtype), MANY.cuda()
    for check in (lambda: None, no_waiting):  # the first time compiles
        check()
        losses = objective(sae, x, x, Coefficients(0.0, 1), None if remedy == "none" else dead)
        losses.loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert (losses.code.entries is not None) == (dtype == "float32" or case != "topk multi")
