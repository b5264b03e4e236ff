"""The fused encoder and choice in Triton against plain sorting; see test_triton_products.py for where it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_helpers import (
    DEVICE,
    compile_kernel,
    needs_triton,
    on_kernels,
    only_once,
    random,
)

from sae_training.kernels import selection, triton_selection
from sae_training.kernels.triton_products import INTERPRETED

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
