"""The Triton kernels against plain sums of torch in float64, then their times. Needs torch, triton and nothing else.

Each comparison also asks for the same bits from a second call. With TRITON_INTERPRET=1 (`gpu_check.py --cpu`) the same
code runs in Triton's interpreter, on tensors of a few dozen numbers.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_training.kernels import triton_products, triton_selection
from sae_training.kernels.sparse_code import Entries, fixed_size_entries
from scripts.benchmarks.gpu_parts import Figures, Items, Skip, median_ms


class Size(NamedTuple):
    rows: int
    d_in: int
    d_sae: int
    k: int


SIZES = {"768": Size(16_384, 768, 24_576, 32), "4096": Size(8_192, 4_096, 131_072, 64)}
TINY = {"768": Size(9, 20, 64, 3)}  # the interpreter takes a second for what a GPU does in no time
TINY_ODD = Size(6, 37, 96, 4)
ODD = Size(130, 300, 4_001, 5)  # no width is a multiple of a block
PAST_INT32 = Size(64, 4_096, 600_000, 8)  # a table of 2.46e9 numbers: its last positions do not fit into int32
CHECKED_ROWS = 256  # of the large sizes, whose reference in float64 would not fit


def items(name: str, device: torch.device) -> Items:
    os.environ["SAE_TRAINING_TRITON"] = "1"  # read when a device is first asked about
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not triton_products.available(device):
            raise RuntimeError(f"the kernels cannot run here: {' '.join(str(w.message) for w in caught)}")
    on_cpu = device.type == "cpu"
    dtypes = (torch.float32,) if on_cpu else (torch.float32, torch.bfloat16, torch.float16)
    sizes = TINY if on_cpu else SIZES
    checked = {"odd": TINY_ODD if on_cpu else ODD}
    checked |= {at: size._replace(rows=min(size.rows, CHECKED_ROWS)) for at, size in sizes.items()}
    found: Items = {}
    for at, size in checked.items():
        for dtype in dtypes:
            found[f"products {at} {short(dtype)}"] = partial(check_products, size, dtype, device)
        for dtype in (torch.float16,) if on_cpu else (torch.bfloat16, torch.float16):
            found[f"selection {at} {short(dtype)}"] = partial(check_selection, size, dtype, device)
    if not on_cpu:
        wide = Size(20_000, 64, 131_072, 64)
        found["products past 2^31"] = partial(check_products, PAST_INT32, torch.bfloat16, device)
        found["selection past 2^31"] = partial(check_selection, wide, torch.bfloat16, device, checked=64)
    return found | {f"times {at}": partial(times, size, device) for at, size in sizes.items()}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------- comparisons


def check_products(size: Size, dtype: torch.dtype, device: torch.device) -> Figures:
    """The three products of a step on random entries, of which one latent is on every row and one row has none."""
    entries = some_entries(size, device)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(size.rows, size.d_in, generator=generator, device=device).to(dtype)
    table = torch.empty(size.d_sae, size.d_in, device=device, dtype=dtype).normal_(generator=generator)
    values = torch.randn(len(entries.latents), generator=generator, device=device).to(dtype)
    order, latents, row_of, offsets = entries.by_latent
    calls: dict[str, Callable[[], Tensor]] = {
        "row_products": lambda: triton_products.row_products(x, table, entries.latents, entries.rows),
        "bags_of_rows": lambda: triton_products.bags(entries.latents, entries.offsets, values, table),
        "bags_of_latents": lambda: triton_products.bags(row_of, offsets, values[order], x, bag_of=latents),
    }
    chosen = table[entries.latents].double()
    of_rows = x[entries.rows].double()
    expected = {"row_products": torch.linalg.vecdot(chosen, of_rows)}
    expected["bags_of_rows"] = torch.zeros(size.rows, size.d_in, dtype=torch.float64, device=device).index_add(
        0, entries.rows, chosen * values.double()[:, None]
    )
    used, place = entries.latents.unique(return_inverse=True)
    expected["bags_of_latents"] = torch.zeros(len(used), size.d_in, dtype=torch.float64, device=device).index_add(
        0, place, of_rows * values.double()[:, None]
    )
    figures: Figures = {}
    for name, call in calls.items():
        found = call()
        assert torch.equal(found, call()), f"{name}: two calls give different bits"
        found = found[used] if name == "bags_of_latents" else found
        figures[name] = error_of(name, found, expected[name])
    return figures


def some_entries(size: Size, device: torch.device) -> Entries:
    """k entries on each row but the first, which has none: latent 7 and others at random, the last ones included."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randint(size.d_sae, (size.rows - 1, size.k), generator=generator)
    latents[:, 0], latents[:, -1] = 7, size.d_sae - 1 - torch.arange(size.rows - 1) % 9
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(size.rows) * size.k])
    return Entries(latents.flatten().to(device), offsets.to(device), size.d_sae)


def error_of(name: str, found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest number expected; AssertionError if it is more than rounding."""
    largest = expected.abs().max().clamp_min(1e-30)
    error = ((found.double() - expected).abs().max() / largest).item()
    limit = 1e-5 if found.dtype == torch.float32 else 2 * torch.finfo(found.dtype).eps
    assert error <= limit, f"{name}: off by {error:.2g} of the largest number, expected at most {limit:.2g}"
    return error


def check_selection(size: Size, dtype: torch.dtype, device: torch.device, checked: int | None = None) -> Figures:
    """The fused product and choice on small integers, whose sums are exact in 16 bits and often equal.

    Only the first and the last `checked` rows are compared where the whole product would not fit in float32.
    """
    generator = torch.Generator(device).manual_seed(3)
    width = min(size.d_in, 48)  # of the numbers that are not 0: sums then stay below 256
    x = torch.zeros(size.rows, size.d_in, device=device)
    x[:, -width:] = torch.randn(size.rows, width, generator=generator, device=device).round()
    table = torch.empty(size.d_sae, size.d_in, device=device).normal_(generator=generator).round_().clamp_(-2, 2)
    bias = torch.randn(size.d_sae, generator=generator, device=device).mul(4).round()
    rows, weights = x.to(dtype), table.to(dtype)
    assert triton_selection.supports(rows, size.d_sae, size.k), f"{size} in {dtype} is not supported"
    places = triton_selection.encode_top_k(rows, weights, bias, size.k)
    assert torch.equal(places, triton_selection.encode_top_k(rows, weights, bias, size.k)), "two calls differ"
    at = slice(None) if checked is None else torch.cat([torch.arange(checked), torch.arange(-checked, 0)])
    sums = x[at][:, -width:] @ table[:, -width:].T + bias
    assert sums.abs().max() <= 256, "the test's own sums are not exact"
    chosen = places[at].sort(dim=1).values
    assert (chosen.diff(dim=1) > 0).all(), "a latent is chosen twice"
    found = sums.gather(1, chosen).sort(dim=1, descending=True).values
    assert torch.equal(found, sums.topk(size.k, dim=1).values), "not the largest"
    return {"rows": len(sums), "same_choice": True}


# -------------------------------------------------------------------------------------------------------------- times


def times(size: Size, device: torch.device) -> Figures:
    """Milliseconds of each kernel in the precision of a default step, of torch's own way, and what of memory it reads.

    Products are in float32; the encoder's product and choice in bfloat16 goes in chunks, as in training.
    """
    generator = torch.Generator(device).manual_seed(4)
    x = torch.randn(size.rows, size.d_in, generator=generator, device=device)
    table = torch.empty(size.d_sae, size.d_in, device=device).normal_(generator=generator)
    latents = torch.randint(size.d_sae, (size.rows, size.k), generator=generator, device=device)
    values = torch.randn(size.rows * size.k, generator=generator, device=device)
    entries = fixed_size_entries(latents, size.d_sae)
    row_numbers = entries.rows
    order, by_latent, row_of, offsets = entries.by_latent
    gathered = 4 * size.rows * size.k * size.d_in / 1e6  # GB/s times ms
    calls: dict[str, Callable[[], object]] = {
        "row_products": lambda: triton_products.row_products(x, table, entries.latents, row_numbers),
        "bags_of_rows": lambda: triton_products.bags(entries.latents, entries.offsets, values, table),
        "bags_of_latents": lambda: triton_products.bags(row_of, offsets, values[order], x, bag_of=by_latent),
    }
    figures: Figures = {}
    for name, call in calls.items():
        ms = median_ms(call, device)
        figures |= {f"{name}_ms": round(ms, 4), f"{name}_gb_per_s": round(gathered / ms)}
    figures["sort_by_latent_ms"] = round(median_ms(lambda: entries.latents.sort(stable=True), device), 4)
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    rows, weights, bias = x.to(dtype), table.to(dtype), torch.zeros(size.d_sae, device=device)
    chunk = max(1, 2**26 // size.d_sae)

    def fused() -> None:
        for part in rows.split(chunk):
            triton_selection.encode_top_k(part, weights, bias, size.k)

    def plain() -> None:
        for part in rows.split(chunk):
            (part @ weights.T + bias).topk(size.k, dim=1, sorted=False)

    figures["encode_top_k_ms"] = round(median_ms(fused, device), 4)
    figures["torch_product_and_topk_ms"] = round(median_ms(plain, device), 4)
    return figures
