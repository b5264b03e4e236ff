"""The choice of active latents, compiled and in plain torch, against plain sorting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_training.kernels import cpu, selection
from sae_training.kernels.selection import Encoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
WIDTHS = (1, 5, 255, 256, 257, 1000, 8192)


@pytest.fixture(params=["compiled", "plain torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain torch":
        monkeypatch.setattr(cpu, "supports", lambda tile: False)
    else:
        assert cpu.available()
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("k", (1, 3, 64, 10_000))
def test_top_k_takes_the_largest_sums(way: str, k: int, n: int, dtype: str) -> None:
    tile, bias = random(7, n, dtype=DTYPES[dtype]), random(n, dtype=DTYPES[dtype], seed=1)
    sums = tile.double() + bias.double()
    if dtype == "bfloat16" and way == "plain torch":
        sums = (tile + bias).double()  # rounded: some are then equal
    places = selection.top_k(tile, bias, k)
    assert places.shape == (7, min(k, n))
    for row, chosen in zip(sums.tolist(), places.tolist(), strict=True):
        assert len(set(chosen)) == len(chosen)
        assert sorted((row[i] for i in chosen), reverse=True) == sorted(row, reverse=True)[: min(k, n)]


def test_of_equal_numbers_the_first_are_taken() -> None:
    tile = torch.zeros(2, 1000)
    tile[1, 700] = 1.0
    places = cpu.top_k(tile, torch.zeros(1000), 3)
    assert [sorted(row) for row in places.tolist()] == [[0, 1, 2], [0, 1, 700]]


@pytest.mark.parametrize("k", (0, 3, 600, 2000))
def test_highest_come_first_and_of_equals_the_first(way: str, k: int) -> None:
    x = random(5, 600).mul(3).round()  # many are equal
    places, values = selection.highest(x, k)
    assert values.tolist() == [sorted(row, reverse=True)[:k] for row in x.tolist()]
    assert x.gather(1, places).tolist() == values.tolist()
    if way == "compiled":  # plain torch may choose other ones of those that are equal to the last
        assert places.tolist() == [sorted(range(600), key=lambda i: (-row[i], i))[:k] for row in x.tolist()]


def test_infinite_and_missing_numbers_have_their_place_in_the_order(way: str) -> None:
    tile = torch.full((1, 600), -5.0)
    missing = torch.tensor(math.inf) - math.inf  # as a processor makes it, with the sign bit
    tile[0, :6] = torch.tensor([-math.inf, math.inf, missing, -1.0, 3.0e38, -1e-45])
    order = [2, 1, 4, 5, 3]  # NaN, infinity, the largest float, the smallest below 0, -1
    for k in range(1, 6):
        assert sorted(selection.top_k(tile, torch.zeros(600), k)[0].tolist()) == sorted(order[:k])


def test_a_bias_of_minus_infinity_is_chosen_last(way: str) -> None:
    bias = torch.full((500,), -math.inf)
    bias[100:104] = 0.0
    places = selection.top_k(random(20, 500), bias, 4)
    assert all(sorted(row) == [100, 101, 102, 103] for row in places.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_above_finds_every_place_in_order(way: str, n: int, dtype: str) -> None:
    tile, limits = random(9, n, dtype=DTYPES[dtype]), random(n, seed=1) + 1.0
    limits[0] = float(tile[0, 0])  # equal is not above
    places, offsets = selection.above(tile, limits)
    for row in range(9):
        expected = [i for i in range(n) if float(tile[row, i]) > float(limits[i])]
        assert places[int(offsets[row]) : int(offsets[row + 1])].tolist() == expected


def test_a_tile_that_is_part_of_a_larger_tensor(way: str) -> None:
    whole, bias = random(6, 2000), random(2000, seed=1)
    part = selection.top_k(whole[1:5, 300:1300], bias[300:1300], 8)
    assert torch.equal(part, selection.top_k(whole[1:5, 300:1300].clone(), bias[300:1300].clone(), 8))


@pytest.mark.parametrize("n_threads", (1, 2))
def test_the_number_of_threads_changes_nothing(n_threads: int) -> None:
    tile, bias = random(64, 4096), random(4096, seed=1)
    before = torch.get_num_threads()
    expected = cpu.top_k(tile, bias, 16), *cpu.above(tile, bias + 2)
    torch.set_num_threads(n_threads)
    try:
        found = cpu.top_k(tile, bias, 16), *cpu.above(tile, bias + 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tile_latents", (8192, 100))
def test_choices_of_a_batch_are_those_of_the_dense_pre_activations(way: str, tile_latents: int) -> None:
    x, W_enc, b_enc = random(50, 16), random(16, 350, seed=1), random(350, seed=2)
    encoder = Encoder(x, W_enc, b_enc, torch.float64, tile_latents, tile_rows=8)
    pre = x.double() @ W_enc.double() + b_enc

    def mask(entries: selection.Entries | None) -> Tensor:
        assert entries is not None
        return entries.dense(torch.ones(len(entries.latents))) > 0

    of_rows = mask(selection.top_k_of_rows(encoder, 5))
    assert torch.equal(of_rows, pre >= pre.sort(dim=1).values[:, -5:].amin(dim=1, keepdim=True))
    of_batch = mask(selection.top_k_of_batch(encoder, 5))
    assert torch.equal(of_batch, pre >= pre.flatten().sort().values[-250])
    limits = random(350, seed=3).abs() + 5
    assert torch.equal(mask(selection.above_threshold(encoder, limits)), pre > limits)
    assert torch.equal(mask(selection.above_threshold(encoder, 6.0)), pre > 6.0)
    assert selection.above_threshold(encoder, 0.0) is None  # half of them: too many


@pytest.mark.parametrize("n", (0, 1, 1000))
def test_entries_are_sorted_by_latent(n: int) -> None:
    latents = torch.randint(0, 40, (n,), generator=torch.Generator().manual_seed(0))
    order, offsets = cpu.sort_by_latent(latents, 40)
    assert order.tolist() == sorted(range(n), key=lambda entry: (int(latents[entry]), entry))
    assert offsets.tolist() == [int((latents < latent).sum()) for latent in range(41)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("d", (1, 16, 100, 576))
def test_products_at_entries(d: int, dtype: str) -> None:
    rows, table = random(4, d, dtype=DTYPES[dtype]), random(30, d, dtype=DTYPES[dtype], seed=1)
    latents, offsets = torch.tensor([3, 29, 0, 3, 7]), torch.tensor([0, 2, 2, 4, 5])
    expected = torch.stack(
        [(rows[r].double() * table[i].double()).sum() for r, i in zip((0, 0, 2, 2, 3), latents, strict=True)]
    )
    found = cpu.row_products(rows, table, offsets, latents)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 if dtype == "float32" else 1e-12)
    nothing = cpu.row_products(rows, table, torch.zeros(5, dtype=torch.int64), latents[:0])
    assert nothing.shape == (0,)


# ------------------------------------------------------------------------------------------------------------ compiling


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cpu.compiled(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.setattr(cpu, "run_compiler", lambda *_: pytest.fail("compiled again"))
    assert cpu.compiled(tmp_path) == path


def test_without_a_compiler_the_run_goes_on_and_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found.*\n.*apt install g\+\+"):
        assert cpu.library.__wrapped__() is None


def test_what_the_compiler_says_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'cannot execute cc1plus' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="cannot execute cc1plus"):
        assert cpu.library.__wrapped__() is None
    assert list((tmp_path / "cache").rglob("*.so")) == []
