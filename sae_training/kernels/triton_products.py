"""GPU kernels in Triton for the sparse products of `sparse_code`, and the rule when to use them.

Two products make up all five of a sparse step:

    row_products  out[e] = rows[row e] . table[latent e]                          one number for each entry
    bags          out[b] = sum of weights[e] * table[index e] over bag b's entries, one row for each bag

The bags are the rows of a batch (decode) or the latents (weight gradients). All sums are in float32. Their order
depends on the data alone: there are no atomics, and block sizes are fixed, not found by timing. Two runs on the same
kind of device therefore give the same bits, which exact resume needs.

The kernels are off unless SAE_TRAINING_TRITON=1 is in the environment: they compile for sm_80 and sm_90 and are exact
in Triton's interpreter, but no GPU has run or timed them yet. Where Triton is missing or cannot compile, `available` is
False, and callers use plain torch. With TRITON_INTERPRET=1 in the environment at import the kernels run in the
interpreter, on CPU tensors too.
"""

# Triton needs the annotation tl.constexpr, which is not a type.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor


def optional_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton, tl = optional_module("triton"), optional_module("triton.language")
jit: Any = (lambda function: function) if triton is None else triton.jit

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BLOCK_ENTRIES = 8  # entries that a program reads at once
MAX_BLOCK_D = 256  # columns of a program at most; wider rows take several programs, or a loop
CHUNK = 256
"""Entries of a chunk. A program of its own sums each whole chunk inside one bag, so that for a latent that is active on
every row no program sums more than 2 * CHUNK entries and the chunks' sums."""

SPARSE_FROM = {"float32": 32, "tf32": 128, "bfloat16": 128}
"""d_sae / k from which the sparse way is faster, by precision of the dense products."""


# ---------------------------------------------------------------------------------------------------------- when to use


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: on CUDA if they are on and compile, in the interpreter anywhere."""
    wanted = INTERPRETED or (device.type == "cuda" and os.environ.get("SAE_TRAINING_TRITON") == "1")
    if triton is None or not wanted:
        return False
    try:
        one = torch.ones(1, 1, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        row_products(one, one, zero, zero)
    except Exception as error:  # for example no C compiler, no Python headers, or too old a GPU
        warnings.warn(f"Triton cannot run on {device}: no sparse kernels there. {error}", stacklevel=2)
        return False
    return True


def supports(x: Tensor) -> bool:
    """Whether the kernels work on tensors like `x`."""
    return x.dtype in DTYPES and available(x.device)


def use_triton(device: torch.device, dtype: torch.dtype, d_sae: int, k: int) -> bool:
    """Whether a step with k active latents a row is faster through these kernels than with dense products.

    Times for each row and column of d_in, in picoseconds, on an H100 (F = 600 TFLOP/s in bfloat16, 300 in TF32, 50 in
    float32; W = 2.8 TB/s):

        dense    6 products, 12 d_sae / F, and about 9 passes over the (rows, d_sae) activations, 9 d_sae s / (W d_in)
        sparse   1 product in bfloat16, 2 d_sae / F, 3 passes, and 4 gathers of k rows, 4 k s / W

    where s is the bytes of a number. The two are equal at d_sae / k = 24 in float32, and for d_in = 768 at about 113 in
    TF32 and 128 in bfloat16. For wider inputs passes cost less beside products (171 in bfloat16 for very wide ones);
    for dictionaries that fit into the L2 cache (50 MB) gathers cost less. SPARSE_FROM rounds these. Not measured.
    """
    if dtype not in DTYPES or not available(device):
        return False
    precision = "bfloat16" if dtype != torch.float32 else "tf32" if float32_products_are_tf32() else "float32"
    return d_sae >= SPARSE_FROM[precision] * k


def float32_products_are_tf32() -> bool:
    settings: Any = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # since torch 2.9, where reading the older setting can raise
        return settings.fp32_precision == "tf32"
    return settings.allow_tf32


# ------------------------------------------------------------------------------------------------------------ launching


def row_products(rows: Tensor, table: Tensor, latents: Tensor, row_of: Tensor) -> Tensor:
    """(n,): rows[row_of[e]] . table[latents[e]], from `rows` (n_rows, d), `table` (d_sae, d) and indices (n,) int64.

    A program takes a fixed number of entries from any rows, so that rows with many entries do not slow others down.
    """
    rows, table, n, d = unit_stride(rows), unit_stride(table), len(latents), rows.shape[1]
    latents, row_of = latents.contiguous(), row_of.contiguous()
    out = torch.empty(n, dtype=rows.dtype, device=rows.device)
    if n:
        sizes = {"BLOCK_ENTRIES": 2 * BLOCK_ENTRIES, "BLOCK_D": block_of(d, MAX_BLOCK_D // 2)}
        with torch.cuda.device_of(rows):
            row_products_kernel[(cdiv(n, sizes["BLOCK_ENTRIES"]),)](
                rows, rows.stride(0), table, table.stride(0), latents, row_of, out, n, d, **sizes
            )
    return out


def bags(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor,
    table: Tensor,
    bag_of: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """(n_bags, d): for each bag, the sum of weights[e] * table[indices[e]] over its entries; `table` is (m, d).

    Bag b has the entries offsets[b] to offsets[b + 1] of `indices` and `weights` (n,). One program sums a bag, for each
    block of columns. Where bags differ much in size, give `bag_of` (n,), the bag of each entry: whole chunks of `chunk`
    entries inside long bags are then summed first, into (n / chunk, d) of scratch memory. The two stages stand in for
    atomic additions, whose order changes from run to run.
    """
    table, n, d, n_bags = unit_stride(table), len(indices), table.shape[1], len(offsets) - 1
    indices, weights = indices.contiguous(), weights.contiguous()  # an expanded gradient has a stride of 0
    block_d = block_of(d, MAX_BLOCK_D)
    sizes = {"CHUNK": chunk, "BLOCK_ENTRIES": BLOCK_ENTRIES, "BLOCK_D": block_d}
    n_chunks, n_blocks = 0 if bag_of is None else n // chunk, cdiv(d, block_d)
    out = torch.empty(n_bags, d, dtype=table.dtype, device=table.device)
    sums = torch.empty(n_chunks, d, dtype=torch.float32, device=table.device)
    with torch.cuda.device_of(table):
        if n_chunks:
            chunks_kernel[(n_chunks, n_blocks)](indices, weights, bag_of, table, table.stride(0), sums, d, **sizes)
        if n_bags:
            bags_kernel[(n_bags, n_blocks)](
                indices, weights, offsets, table, table.stride(0), sums, out, d, HAS_CHUNKS=n_chunks > 0, **sizes
            )
    return out


def unit_stride(x: Tensor) -> Tensor:
    """`x` (n, d) with the numbers of each row next to each other in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def block_of(n: int, limit: int) -> int:
    """The smallest power of two that is at least `n`, but between 16 and `limit`."""
    return min(limit, max(16, 1 << (n - 1).bit_length()))


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


# -------------------------------------------------------------------------------------------------------------- kernels
# Positions are int64 throughout, because d_sae * d and n both exceed 2^31 in large runs.


@jit
def row_products_kernel(
    rows, rows_stride, table, table_stride, latents, row_of, out, n, d,
    BLOCK_ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    exists = entries < n
    row_starts = tl.load(row_of + entries, exists, 0) * rows_stride
    table_starts = tl.load(latents + entries, exists, 0) * table_stride
    products = tl.zeros((BLOCK_ENTRIES, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (columns < d)[None, :]
        x = tl.load(rows + row_starts[:, None] + columns[None, :], inside, 0.0)
        w = tl.load(table + table_starts[:, None] + columns[None, :], inside, 0.0)
        products += x.to(tl.float32) * w.to(tl.float32)
    tl.store(out + entries, tl.sum(products, axis=1).to(out.dtype.element_ty), exists)


@jit
def add_entries(total, start, end, indices, weights, table, table_stride, columns, in_row, BLOCK_ENTRIES: tl.constexpr):
    """`total` (BLOCK_ENTRIES, BLOCK_D) plus weights[e] * table[indices[e], columns] for the entries start to end."""
    for first in range(start, end, BLOCK_ENTRIES):
        entries = first + tl.arange(0, BLOCK_ENTRIES)
        exists = entries < end
        starts = tl.load(indices + entries, exists, 0) * table_stride
        weight = tl.load(weights + entries, exists, 0.0).to(tl.float32)
        row = tl.load(table + starts[:, None] + columns[None, :], exists[:, None] & in_row[None, :], 0.0)
        total += weight[:, None] * row.to(tl.float32)
    return total


@jit
def chunks_kernel(
    indices, weights, bag_of, table, table_stride, sums, d,
    CHUNK: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums[c] of each chunk c (entries c * CHUNK to (c + 1) * CHUNK) that lies in one bag; others are not written."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    if tl.load(bag_of + start) == tl.load(bag_of + start + CHUNK - 1):
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = columns < d
        total = tl.zeros((BLOCK_ENTRIES, BLOCK_D), tl.float32)
        total = add_entries(
            total, start, start + CHUNK, indices, weights, table, table_stride, columns, in_row, BLOCK_ENTRIES
        )
        tl.store(sums + chunk * d + columns, tl.sum(total, axis=0), in_row)


@jit
def bags_kernel(
    indices, weights, offsets, table, table_stride, sums, out, d,
    HAS_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b]: the bag's entries before its first whole chunk, plus the sums of its whole chunks, plus entries after."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < d
    start = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1)
    total = tl.zeros((BLOCK_ENTRIES, BLOCK_D), tl.float32)
    if HAS_CHUNKS:
        first_chunk = (start + CHUNK - 1) // CHUNK
        last_chunk = end // CHUNK
        head_end = tl.minimum(end, first_chunk * CHUNK)
        total = add_entries(
            total, start, head_end, indices, weights, table, table_stride, columns, in_row, BLOCK_ENTRIES
        )
        for first in range(first_chunk, last_chunk, BLOCK_ENTRIES):
            chunks = first + tl.arange(0, BLOCK_ENTRIES)
            inside = (chunks < last_chunk)[:, None] & in_row[None, :]
            total += tl.load(sums + chunks[:, None] * d + columns[None, :], inside, 0.0)
        start = tl.maximum(head_end, last_chunk * CHUNK)
    total = add_entries(total, start, end, indices, weights, table, table_stride, columns, in_row, BLOCK_ENTRIES)
    tl.store(out + bag * d + columns, tl.sum(total, axis=0).to(out.dtype.element_ty), in_row)
