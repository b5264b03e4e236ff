"""The Triton kernels for sparse products against plain sums in float64.

Triton's interpreter must be asked for before triton is imported. Without a GPU, the tests of Triton kernels therefore
run once more in a process of their own, where those that are skipped here work on CPU tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton_helpers import (
    DEVICE,
    compile_kernel,
    needs_gpu,
    needs_triton,
    on_kernels,
    only_once,
    random,
)

from sae_training.kernels import sparse_code, triton_products
from sae_training.kernels.sparse_code import Entries, fixed_size_entries, keys_of, offsets_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS = (1, 37, 300)  # 300: two blocks of columns, the second partly empty
N_ROWS, D_SAE = 9, 12
CHUNK = 24  # instead of 256, for the interpreter's sake


@pytest.mark.slow
@needs_triton
@only_once
def test_kernels_in_the_interpreter() -> None:
    here = Path(__file__).parent
    files = map(str, [__file__, here / "test_triton_selection.py", here.parent / "training/test_objective_on_gpu.py"])
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *files]
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


# ------------------------------------------------------------------------------------------------------------- helpers


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


# -------------------------------------------------------------------------------------------------------- on a GPU


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
