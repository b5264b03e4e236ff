"""The encoder's product and the choice of the k largest of each row, fused, as GPU kernels in Triton.

torch.topk reads every pre-activation several times, after one kernel wrote them and another one added the bias. Here
the product's kernel adds the bias, and writes the maximum of each GROUP latents beside the tile. The k largest numbers
of a row lie in the k groups with the largest maxima, so a second kernel, run twice, finishes the choice: it picks k of
the maxima, then k of the numbers in their groups. For 8,192 latents and k = 32 it reads 512 maxima and 512 numbers of a
row again, not 8,192.

The choice is made by bisection over the bits of the numbers, without sorting, and with the same result each time.
`selection.top_k_by_groups` is the reference on the CPU. No GPU has run or timed these kernels yet.
"""

# Triton needs the annotation tl.constexpr, which is not a type.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from sae_training.kernels import triton_products
from sae_training.kernels.triton_products import block_of, cdiv, jit, tl

GROUP = 16  # latents of a group: 32 bytes of a 16-bit tile, the least that a GPU reads
BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D = 128, 128, 64
MAX_CANDIDATES = 16384  # numbers that one program compares


def supports(rows: Tensor, d_sae: int, k: int) -> bool:
    """Whether `encode_top_k` works for `rows` (n, d), given in the precision of the product."""
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    dtypes = (torch.float16,) if triton_products.INTERPRETED else (torch.float16, torch.bfloat16)
    fits = max(cdiv(d_sae, GROUP), k * GROUP) <= MAX_CANDIDATES
    return rows.dtype in dtypes and fits and triton_products.available(rows.device)


def encode_top_k(rows: Tensor, table: Tensor, bias: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row of `rows` (n, d) @ `table` (d_sae, d).T + `bias` (d_sae,), (n, k) int64.

    The places of a row are in no order. k <= d_sae. `rows` and `table` have the same 16-bit precision, as do the sums
    when they are compared.
    """
    rows, table, bias = rows.contiguous(), table.contiguous(), bias.contiguous()
    (n, d), d_sae = rows.shape, len(table)
    n_groups = cdiv(d_sae, GROUP)
    tile = torch.empty(n, d_sae, dtype=rows.dtype, device=rows.device)
    maxima = torch.empty(n, n_groups, dtype=rows.dtype, device=rows.device)
    if not n:
        return torch.empty(0, k, dtype=torch.int64, device=rows.device)
    sizes = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_LATENTS": BLOCK_LATENTS, "BLOCK_D": BLOCK_D, "GROUP": GROUP}
    with torch.cuda.device_of(rows):
        encode_kernel[(cdiv(n, BLOCK_ROWS), cdiv(d_sae, BLOCK_LATENTS))](
            rows, table, bias, tile, maxima, n, d, d_sae, n_groups, num_warps=8, **sizes
        )
        groups = largest(maxima, min(k, n_groups))
        return largest(tile, k, groups)


def largest(numbers: Tensor, k: int, groups: Tensor | None = None) -> Tensor:
    """Places of the k largest of each row of `numbers` (n, width), or of those in its `groups` (n, m)."""
    n, width = numbers.shape
    n_groups = 0 if groups is None else groups.shape[1]
    n_candidates = width if groups is None else n_groups * GROUP
    out = torch.empty(n, k, dtype=torch.int64, device=numbers.device)
    block = block_of(n_candidates, MAX_CANDIDATES)
    warps = min(16, max(4, block // 1024))  # with 4, a block of 8,192 spills registers, one of 16,384 3 KB a thread
    top_k_kernel[(n,)](
        numbers, out if groups is None else groups, out, width, n_groups, n_candidates, k,
        HAS_GROUPS=groups is not None, GROUP=GROUP, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------------------------------- kernels


@jit
def encode_kernel(
    rows, table, bias, tile, maxima, n, d, d_sae, n_groups,
    BLOCK_ROWS: tl.constexpr, BLOCK_LATENTS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """tile (n, d_sae) = rows @ table.T + bias, and maxima (n, n_groups) of each GROUP latents of it.

    Programs for the same latents run one after the other, so that their part of the table is read once.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    latent = tl.program_id(1).to(tl.int64) * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)
    is_row, is_latent = row < n, latent < d_sae
    total = tl.zeros((BLOCK_ROWS, BLOCK_LATENTS), tl.float32)
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        is_column = column < d
        x = tl.load(rows + row[:, None] * d + column[None, :], is_row[:, None] & is_column[None, :], 0.0)
        w = tl.load(table + latent[None, :] * d + column[:, None], is_latent[None, :] & is_column[:, None], 0.0)
        total += tl.dot(x, w)
    total += tl.load(bias + latent, is_latent, 0.0).to(tl.float32)[None, :]
    rounded = total.to(tile.dtype.element_ty)
    tl.store(tile + row[:, None] * d_sae + latent[None, :], rounded, is_row[:, None] & is_latent[None, :])

    compared = tl.where(is_latent[None, :], rounded.to(tl.float32), float("-inf"))
    group_maxima = tl.max(tl.reshape(compared, (BLOCK_ROWS, BLOCK_LATENTS // GROUP, GROUP)), axis=2)
    group = tl.program_id(1).to(tl.int64) * (BLOCK_LATENTS // GROUP) + tl.arange(0, BLOCK_LATENTS // GROUP)
    inside = is_row[:, None] & (group < n_groups)[None, :]
    tl.store(maxima + row[:, None] * n_groups + group[None, :], group_maxima.to(maxima.dtype.element_ty), inside)


@jit
def top_k_kernel(
    numbers, groups, out, width, n_groups, n_candidates, k,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (n, k): places of the k largest candidates of each row of `numbers` (n, width), which have 16 bits."""
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK)
    exists = candidate < n_candidates
    place = candidate.to(tl.int64)
    if HAS_GROUPS:
        place = tl.load(groups + row * n_groups + candidate // GROUP, exists, 0) * GROUP + candidate % GROUP
        exists = exists & (place < width)
    # The bits as integers in the order of the numbers: for numbers below 0, all bits but the sign are flipped.
    bits = tl.load(numbers + row * width + place, exists, 0.0).to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.where(exists, bits ^ ((bits >> 15) & 0x7FFF), -(2**15) - 1)

    low, high = -(2**15), 2**15 - 1  # of the k-th largest key
    for _ in range(16):
        middle = (low + high + 1) >> 1
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    is_above, is_equal = key > low, key == low
    n_above = tl.sum(is_above.to(tl.int32), axis=0)
    before = tl.where(
        is_above, tl.cumsum(is_above.to(tl.int32), axis=0), n_above + tl.cumsum(is_equal.to(tl.int32), axis=0)
    )
    tl.store(out + row * k + before - 1, place, is_above | (is_equal & (before <= k)))
