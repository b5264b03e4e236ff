"""The Triton kernels against plain sums in float64, and the sparse way on a GPU against the dense one.

Triton's interpreter must be asked for before triton is imported. Without a GPU, this file therefore runs once more in a
process of its own, where the tests that are skipped here work on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_training.kernels import selection, sparse_code, triton_products, triton_selection
from sae_training.kernels.sparse_code import Entries, fixed_size_entries, keys_of, offsets_of
from sae_training.kernels.triton_products import INTERPRETED

os.environ["SAE_TRAINING_TRITON"] = "1"  # read when a device is first asked about
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
on_kernels = pytest.mark.skipif(
    not (INTERPRETED or (HAS_TRITON and DEVICE.type == "cuda")),
    reason="needs a GPU and triton, or TRITON_INTERPRET=1 (see test_kernels_in_the_interpreter)",
)
only_once = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with the interpreter")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS = (1, 37, 300)  # 300: two blocks of columns, the second partly empty
N_ROWS, D_SAE = 9, 12
CHUNK = 24  # instead of 256, for the interpreter's sake


@pytest.mark.slow
@needs_triton
@only_once
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(Path(__file__))]
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


# ------------------------------------------------------------------------------------------------------------- helpers


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def some_entries(counts: list[int], d_sae: int = D_SAE) -> Entries:
    """`counts[i]` entries on row i, of latents that leave out the last."""
    latents = torch.randint(d_sae - 1, (sum(counts),), generator=torch.Generator().manual_seed(3))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Entries(latents.to(DEVICE), offsets.to(DEVICE), d_sae)


CODES = {
    "fixed": [4] * N_ROWS,
    "empty rows": [0, 3, 0, 11, 1, 0, 0, 17, 0],
    "nothing": [0] * N_ROWS,
    "one entry": [0] * 8 + [1],
}


def plain_row_products(rows: Tensor, table: Tensor, latents: Tensor, row_of: Tensor) -> Tensor:
    return (rows.double()[row_of] * table.double()[latents]).sum(dim=1)


def plain_bags(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    edges = offsets.tolist()
    summands = weights.double()[:, None] * table.double()[indices]
    return torch.stack([summands[i:j].sum(dim=0) for i, j in zip(edges, edges[1:], strict=False)])


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To the rounding of sums in float32, and of the result in its own precision."""
    tolerance = 1e-5 if found.dtype == torch.float32 else 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 10)


# ---------------------------------------------------------------------------------------------------- each kernel alone


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("code", CODES)
def test_row_products(code: str, d: int, dtype: str) -> None:
    entries = some_entries(CODES[code])
    rows, table = random(N_ROWS, d, dtype=DTYPES[dtype], seed=1), random(D_SAE, d, dtype=DTYPES[dtype], seed=2)
    found = triton_products.row_products(rows, table, entries.latents, entries.rows)
    assert found.dtype == rows.dtype
    assert_close(found, plain_row_products(rows, table, entries.latents, entries.rows))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("code", CODES)
def test_sums_of_latents_in_each_row(code: str, d: int, dtype: str) -> None:
    entries = some_entries(CODES[code])
    values, table = random(len(entries.latents), dtype=DTYPES[dtype]), random(D_SAE, d, dtype=DTYPES[dtype], seed=2)
    found = triton_products.bags(entries.latents, entries.offsets, values, table)
    assert found.dtype == table.dtype
    assert_close(found, plain_bags(entries.latents, entries.offsets, values, table))


LONG = {
    "no entries": [0] * D_SAE,
    "less than a chunk": [1] * D_SAE,
    "one latent has all": [0, 0, 0, 3000, *[0] * 8],
    "whole chunks": [CHUNK, 0, 2 * CHUNK, 1, CHUNK - 1, *[0] * 7],
    "across chunks": [CHUNK - 3, 6, 2 * CHUNK - 2, 2 * CHUNK - 1, 2, 0, 3 * CHUNK + 7, *[1] * 5],
}


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", (1, 37))
@pytest.mark.parametrize("lengths", LONG)
def test_sums_of_rows_for_each_latent(lengths: str, d: int, dtype: str) -> None:
    chunk = triton_products.CHUNK if lengths == "one latent has all" else CHUNK
    counts = torch.tensor(LONG[lengths])
    latents = torch.arange(D_SAE).repeat_interleave(counts).to(DEVICE)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(DEVICE)
    row_of = torch.randint(50, (len(latents),), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    rows, values = random(50, d, dtype=DTYPES[dtype], seed=1), random(len(latents), dtype=DTYPES[dtype])
    found = triton_products.bags(row_of, offsets, values, rows, bag_of=latents, chunk=chunk)
    expected = plain_bags(row_of, offsets, values, rows)
    rounding = 1e-4 if dtype == "float32" else 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding * 10)
    assert torch.equal(found, triton_products.bags(row_of, offsets, values, rows, bag_of=latents, chunk=chunk))


@on_kernels
def test_tensors_that_do_not_lie_row_by_row() -> None:
    entries = some_entries([3] * N_ROWS)
    rows, table = random(37, N_ROWS, seed=1).T, random(D_SAE, 2 * 37, seed=2)[:, :37]
    expected = plain_row_products(rows, table, entries.latents, entries.rows)
    assert_close(triton_products.row_products(rows, table, entries.latents, entries.rows), expected)
    same = random(1).expand(len(entries.latents))
    expected = plain_bags(entries.latents, entries.offsets, same, table)
    assert_close(triton_products.bags(entries.latents, entries.offsets, same, table), expected)


SIXTEEN_BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = {  # rows, d_in, d_sae, k
    "odd sizes": (9, 37, 300, 4),
    "several blocks": (130, 70, 400, 8),
    "all latents": (5, 20, 45, 45),
    "most groups": (3, 16, 2000, 120),
}


def check_choice(places: Tensor, sums: Tensor, k: int) -> None:
    """`places` are different ones, and hold the k largest of each row of `sums`."""
    assert places.shape == (len(sums), k)
    for row, chosen in zip(sums.tolist(), places.tolist(), strict=True):
        assert len(set(chosen)) == k
        assert sorted((row[i] for i in chosen), reverse=True) == sorted(row, reverse=True)[:k]


@on_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("sizes", SIZES)
def test_encoder_and_choice_in_one(sizes: str, dtype: str) -> None:
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    n, d, d_sae, k = SIZES[sizes]
    # Small integers: all products and sums are exact in 16 bits, and many of them are equal.
    rows, table = random(n, d, seed=1).mul(1.5).round(), random(d_sae, d, seed=2).mul(1.5).round()
    bias = random(d_sae, seed=3).mul(4).round()
    sums = rows @ table.T + bias
    assert sums.abs().max() <= 256
    rows, table = rows.to(SIXTEEN_BITS[dtype]), table.to(SIXTEEN_BITS[dtype])
    assert triton_selection.supports(rows, d_sae, k)
    places = triton_selection.encode_top_k(rows, table, bias, k)
    check_choice(places, sums, k)
    assert torch.equal(places, triton_selection.encode_top_k(rows, table, bias, k))


@on_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_the_largest_of_rows(k: int, dtype: str) -> None:
    numbers = random(6, 300, dtype=SIXTEEN_BITS[dtype])
    numbers[1, 10:20] = -torch.inf
    numbers[2, :40] = 3.0
    numbers[3] = -numbers[3].abs()
    check_choice(triton_selection.largest(numbers, k), numbers.double(), k)


@on_kernels
def test_latents_without_a_bias_to_speak_of_are_chosen_last() -> None:
    bias = torch.full((300,), -torch.inf, device=DEVICE)
    bias[40:44] = 0
    places = triton_selection.encode_top_k(random(8, 20).half(), random(300, 20, seed=1).half(), bias, 4)
    assert all(sorted(row) == [40, 41, 42, 43] for row in places.tolist())


@on_kernels
def test_selection_takes_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc = random(30, 20), random(20, 200, seed=1), random(200, seed=2)
    encoder = selection.Encoder(x, W_enc, b_enc, torch.float16)
    fused = selection.top_k_of_rows(encoder, 5)
    monkeypatch.setattr(triton_selection, "supports", lambda *_: False)
    plain = selection.top_k_of_rows(encoder, 5)
    assert torch.equal(fused.latents.view(30, 5).sort(dim=1).values, plain.latents.view(30, 5).sort(dim=1).values)
    assert torch.equal(fused.offsets, plain.offsets)


@needs_triton
@only_once
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_fused_kernels_compile_without_a_gpu(
    dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("rows", "table", "tile", "maxima", "numbers"), f"*{dtype}") | {"bias": "*fp32"}
    types |= dict.fromkeys(("groups", "out"), "*i64")
    types |= dict.fromkeys(("n", "d", "d_sae", "n_groups", "width", "n_candidates", "k"), "i32")
    sizes = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64, "GROUP": 16}
    compile_kernel(triton_selection.encode_kernel, types, sizes, capability)
    for has_groups in (False, True):
        compile_kernel(
            triton_selection.top_k_kernel, types, {"HAS_GROUPS": has_groups, "GROUP": 16, "BLOCK": 512}, capability
        )


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    from triton import compile  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: types.get(name) for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@needs_triton
@only_once
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("of_one_column", [False, True], ids=["wide", "one column"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_kernels_compile_without_a_gpu(
    dtype: str, of_one_column: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    data = dict.fromkeys(("rows", "table", "out", "weights"), f"*{dtype}") | {"sums": "*fp32"}
    places = dict.fromkeys(("latents", "row_of", "indices", "bag_of", "offsets"), "*i64")
    numbers = dict.fromkeys(("rows_stride", "table_stride", "n", "d"), "i32")
    blocks = {"BLOCK_ENTRIES": 8, "BLOCK_D": 16 if of_one_column else 256}
    chunked = blocks | {"CHUNK": triton_products.CHUNK}
    kernels = [
        (triton_products.row_products_kernel, blocks),
        (triton_products.chunks_kernel, chunked),
        (triton_products.bags_kernel, chunked | {"HAS_CHUNKS": True}),
        (triton_products.bags_kernel, chunked | {"HAS_CHUNKS": False}),
    ]
    for kernel, constants in kernels:
        if of_one_column:  # the compiler takes a 1 for a constant
            constants = constants | {"d": 1, "table_stride": 1}
        compile_kernel(kernel, data | places | numbers, constants, capability)


# ------------------------------------------------------------------------------------------------- through sparse_code


@on_kernels
@pytest.mark.parametrize("code", ["fixed", "empty rows"])
def test_sparse_code_takes_the_kernels(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = some_entries(CODES[code])
    values, rows, table = random(len(entries.latents)), random(N_ROWS, 20, seed=1), random(D_SAE, 20, seed=2)

    def products() -> list[Tensor]:
        return [
            sparse_code.row_products(rows, table, entries),
            sparse_code.sum_of_latents(values, table, entries),
            sparse_code.sum_of_rows(values, rows, entries),
            entries.sum_by_latent(values),
        ]

    with_kernels = products()
    calls = []
    monkeypatch.setattr(triton_products, "supports", lambda x: calls.append(x))
    for found, plain in zip(with_kernels, products(), strict=True):
        torch.testing.assert_close(found, plain)
    assert len(calls) == 4


def test_offsets_and_rows_of_entries() -> None:
    entries = some_entries(CODES["empty rows"])
    assert entries.rows.tolist() == [1] * 3 + [3] * 11 + [4] + [7] * 17
    assert offsets_of(entries.rows, N_ROWS).tolist() == entries.offsets.tolist()
    assert torch.equal(keys_of(entries.offsets, len(entries.latents)), entries.rows)
    order, latents, rows, offsets = entries.by_latent
    assert latents.tolist() == sorted(entries.latents.tolist())
    assert torch.equal(latents, entries.latents[order])
    assert torch.equal(rows, entries.rows[order])
    assert offsets.tolist() == [(latents < i).sum().item() for i in range(D_SAE + 1)]


# --------------------------------------------------------------------------------------------------------- when to use


def test_without_triton_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_products.available.cache_clear()
    monkeypatch.setattr(triton_products, "triton", None)
    assert not triton_products.available(torch.device("cuda"))
    assert not triton_products.use_triton(torch.device("cuda"), torch.float32, 2**20, 1)
    triton_products.available.cache_clear()


@only_once
def test_the_cpu_keeps_torch() -> None:
    assert not triton_products.supports(torch.zeros(1, 1))


def test_a_triton_that_cannot_run_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no C compiler")

    triton_products.available.cache_clear()
    monkeypatch.setattr(triton_products, "triton", SimpleNamespace())
    monkeypatch.setattr(triton_products, "INTERPRETED", True)
    monkeypatch.setattr(triton_products, "row_products", fails)
    with pytest.warns(UserWarning, match="no C compiler"):
        assert not triton_products.available(torch.device("cpu"))
    triton_products.available.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "d_sae", "k", "expected"),
    [
        (torch.float32, 1024, 32, True),
        (torch.float32, 1023, 32, False),
        (torch.bfloat16, 4096, 32, True),
        (torch.bfloat16, 1024, 32, False),
        (torch.float64, 2**20, 32, False),
    ],
)
def test_use_triton_goes_by_the_latents_for_each_active_one(
    dtype: torch.dtype, d_sae: int, k: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_products, "available", lambda device: True)
    assert triton_products.use_triton(torch.device("cuda"), dtype, d_sae, k) == expected


def test_dense_float32_products_in_tf32_need_sparser_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_products, "available", lambda device: True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not triton_products.use_triton(torch.device("cuda"), torch.float32, 1024, 32)
        assert triton_products.use_triton(torch.device("cuda"), torch.float32, 4096, 32)
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------- whole losses, gradients

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
    from sae_training.config import LanguageModelSAERunnerConfig
    from sae_training.sparse_autoencoder import SparseAutoencoder

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
    from sae_training.sparse_autoencoder.losses import Coefficients
    from sae_training.training.objective import objective

    sae.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    x = (2 * torch.randn(ROWS, sae.d_in, generator=generator) + 0.3).to(sae.device, sae.dtype)
    losses = (objective if sparse else sae.__class__.losses)(sae, x, x, Coefficients(0.03, sae.k), dead)
    assert (losses.code.entries is not None) == sparse
    losses.loss.backward()
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
    return {"sae_out": losses.sae_out, "loss": losses.loss, "remedy": losses.ghost_grad_loss} | gradients


@only_once
@pytest.mark.parametrize("dead", [FEW, MANY], ids=["few dead", "many dead"])
@pytest.mark.parametrize("case", CASES)
def test_auxk_without_asking_which_latents_are_dead(case: str, dead: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_training.training import objective

    sae = autoencoder(torch.device("cpu"), "float64", **CASES[case], **REMEDIES["auxk"])
    dense = losses_and_gradients(sae, dead, sparse=False)
    monkeypatch.setattr(objective, "dead_entries", objective.dead_entries_of_all)
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
    from sae_training.training import objective

    monkeypatch.setattr(objective, "dead_entries", objective.dead_entries_of_all)
    monkeypatch.setattr("sae_training.sparse_autoencoder.SparseAutoencoder.to_revive", lambda self, dead: dead)
    monkeypatch.setattr(Entries, "rows", property(lambda self: keys_of(self.offsets, len(self.latents))))
    sae = autoencoder(torch.device("cpu"), "float64", **CASES[case], **REMEDIES[remedy])
    x = torch.randn(ROWS, D_IN, dtype=torch.float64)
    with NoWaiting():
        dead = None if remedy == "none" else MANY
        losses = objective.objective(sae, x, x, objective.Coefficients(0.0, K), dead)
        losses.loss.backward()
        losses.code.counts()
    assert losses.code.entries is not None
    with pytest.raises(RuntimeError, match="would wait"), NoWaiting():
        x[x > 0]


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 (see test_kernels_in_the_interpreter)")
@pytest.mark.parametrize("case", [*CASES, "batchtopk"])
def test_the_sparse_way_equals_the_dense_way_in_the_interpreter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_training.training import objective

    monkeypatch.setattr(objective, "dead_entries", objective.dead_entries_of_all)
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
    from sae_training.sparse_autoencoder.losses import Coefficients
    from sae_training.training.objective import objective

    sae = autoencoder(torch.device("cuda"), dtype, **CASES[case], **REMEDIES[remedy])
    x, dead = torch.randn(ROWS, D_IN, device="cuda", dtype=sae.dtype), MANY.cuda()
    for check in (lambda: None, no_waiting):  # the first time compiles
        check()
        losses = objective(sae, x, x, Coefficients(0.0, 1), None if remedy == "none" else dead)
        losses.loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert (losses.code.entries is not None) == (dtype == "float32" or case != "topk multi")


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_step_of_realistic_size_on_a_gpu() -> None:
    """A latent active on every row among 24,576, as no small test has it."""
    rows, d, d_sae, k = 2048, 768, 24576, 32
    generator = torch.Generator("cuda").manual_seed(0)
    latents = torch.randint(d_sae, (rows, k), device="cuda", generator=generator)
    latents[:, 0] = 7
    entries = fixed_size_entries(latents, d_sae)
    x, table = (torch.randn(n, d, device="cuda", generator=generator) for n in (rows, d_sae))
    values = torch.randn(rows * k, device="cuda", generator=generator)

    def check(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)

    of_latents = table.double()[entries.latents]
    check(sparse_code.row_products(x, table, entries), torch.linalg.vecdot(of_latents, x.double()[entries.rows]))
    empty = torch.zeros(rows, d, dtype=torch.float64, device="cuda")
    of_latents *= values.double()[:, None]
    check(sparse_code.sum_of_latents(values, table, entries), empty.index_add(0, entries.rows, of_latents))
    of_rows = values.double()[:, None] * x.double()[entries.rows]
    empty = torch.zeros(d_sae, d, dtype=torch.float64, device="cuda")
    check(sparse_code.sum_of_rows(values, x, entries), empty.index_add(0, entries.latents, of_rows))
