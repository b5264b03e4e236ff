"""Where tests of Triton kernels run: on a GPU, or in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

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


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    from triton import compile  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: types.get(name) for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
