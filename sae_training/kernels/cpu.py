"""Compiled loops for the CPU: the choices of `selection` (the k largest of a row, what is above a threshold), and the
sort of entries and their products with rows for `sparse_code`.

`cpu.cpp` is compiled when it is first needed, in about a second, by the machine's C++ compiler ($CXX, c++, g++ or
clang++). The library is kept in the user's cache. Without a compiler `available` is False, and callers use plain torch,
whose choice takes six times as long, a sixth of a TopK step.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.machine.precision import at_least_float32

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
VECTORS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}
"""Not -march=native, because machines with different processors may share a home folder."""
NUMBERS = {torch.bfloat16: "BFloat16", torch.float32: "Float32", torch.float64: "Float64"}
"""The dtypes that a tile may have, with their names in cpu.cpp."""


def available() -> bool:
    return library() is not None


def supports(tile: Tensor) -> bool:
    """Whether the kernels work on tensors like `tile`."""
    return tile.device.type == "cpu" and tile.dtype in NUMBERS and available()


def top_k(tile: Tensor, bias: Tensor, k: int) -> Tensor:
    """Places of the k largest numbers of each row of `tile` (rows, n) + `bias` (n,), as (rows, k) int64, in no order.

    1 <= k <= n. Of equal numbers the first are taken.
    """
    tile, bias = tile.contiguous(), bias.to(at_least_float32(tile.dtype)).contiguous()
    out = torch.empty(len(tile), k, dtype=torch.int64)
    call("top_k", tile, bias, ctypes.c_int64(k), threads(), address(out))
    return out


def above(tile: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Where `tile` (rows, n) is above `limits` (n,).

    The places, row after row and ascending, and the rows' offsets (rows + 1,) among them, both int64.
    """
    tile, limits = tile.contiguous(), limits.to(at_least_float32(tile.dtype)).contiguous()
    offsets = torch.zeros(len(tile) + 1, dtype=torch.int64)
    call("count_above", tile, limits, threads(), address(offsets))
    offsets = offsets.cumsum(0)
    places = torch.empty(int(offsets[-1]), dtype=torch.int64)
    call("places_above", tile, limits, threads(), address(offsets), address(places))
    return places, offsets


def sort_by_latent(latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """The stable order (n,) of entries by their `latents` (n,), and the latents' offsets (d_sae + 1,) in it, all int64.

    Sorts by counting, because torch.sort of 131,072 entries takes nine times as long.
    """
    loaded, latents = library(), latents.contiguous()
    assert loaded is not None
    offsets = torch.empty(d_sae + 1, dtype=torch.int64)
    order = torch.empty(len(latents), dtype=torch.int64)
    n, width = ctypes.c_int64(len(latents)), ctypes.c_int64(d_sae)
    loaded.sort_by_latent(address(latents), n, width, address(offsets), address(order))
    return order, offsets


def row_products(rows: Tensor, table: Tensor, offsets: Tensor, latents: Tensor) -> Tensor:
    """(n,): rows[row e] . table[latents[e]], where row i has the entries offsets[i] to offsets[i + 1].

    `rows` (n_rows, d) and `table` (d_sae, d) are both in float32 or both in float64.
    """
    loaded, rows, table, latents = library(), rows.contiguous(), table.contiguous(), latents.contiguous()
    assert loaded is not None
    n_rows, d = (ctypes.c_int64(size) for size in rows.shape)
    out = torch.empty(len(latents), dtype=rows.dtype)
    kernel = getattr(loaded, f"row_products_{NUMBERS[rows.dtype]}")
    kernel(address(rows), address(table), address(offsets), address(latents), n_rows, d, threads(), address(out))
    return out


def call(name: str, tile: Tensor, by_place: Tensor, *arguments: Any) -> None:
    loaded = library()
    assert loaded is not None
    n_rows, n = (ctypes.c_int64(size) for size in tile.shape)
    getattr(loaded, f"{name}_{NUMBERS[tile.dtype]}")(address(tile), n_rows, n, address(by_place), *arguments)


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


# ------------------------------------------------------------------------------------------------------------ compiling


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None after a warning where they cannot be compiled."""
    try:
        return ctypes.CDLL(str(compiled(cache_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        shown = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"The kernels for the CPU could not be compiled, so training steps take about a fifth longer: {shown}\n"
            "Installing a C++ compiler mends this (Debian and Ubuntu: apt install g++; macOS: xcode-select --install).",
            stacklevel=2,
        )
        return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-training" / "kernels"


def compiled(folder: Path) -> Path:
    """The shared library in `folder` for this source, compiler and options, compiled if it is not there yet."""
    compiler = find_compiler()
    options = (*FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, options)).encode()).hexdigest()[:16]
    path = folder / f"{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        # Apple's compiler has no OpenMP (the kernels then use one thread); old compilers lack these processors.
        attempts = [(*options, "-fopenmp"), options, (*FLAGS, "-fopenmp"), FLAGS]
        for attempt in attempts:
            try:
                run_compiler(compiler, attempt, made)
                break
            except subprocess.CalledProcessError:
                if attempt is attempts[-1]:
                    raise
        made.replace(path)  # atomically, because another process may be compiling the same
    return path


def find_compiler() -> str:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = [path for name in names if name and (path := shutil.which(name))]
    if not found:
        raise FileNotFoundError("no C++ compiler was found ($CXX, c++, g++, clang++)")
    return found[0]


def run_compiler(compiler: str, options: tuple[str, ...], out: Path) -> None:
    command = [compiler, *options, str(SOURCE), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
