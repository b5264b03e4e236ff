"""Precisions: in which a device multiplies fast, and which it has at all."""

from __future__ import annotations

import torch


def bfloat16_is_fast(device: torch.device | str) -> bool:
    """Whether the device has bfloat16 products in hardware."""
    match torch.device(device).type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":  # a forward pass of SmolLM2: 8,980 tokens/s in bfloat16, 2,660 in float32
            # torch can be told to leave AVX512 alone (ATEN_CPU_CAPABILITY), and its bfloat16 attention fails then.
            has_it = bool(torch.cpu._is_avx512_bf16_supported())
            return has_it and "AVX512" in torch.backends.cpu.get_cpu_capability()
        case _:
            return False


def has_float64(device: torch.device | str) -> bool:
    """Whether the device has float64: mps has none, and some Intel GPUs have none."""
    match torch.device(device).type:
        case "mps":
            return False
        case "xpu":
            return bool(torch.xpu.get_device_properties(device).has_fp64)
        case _:
            return True


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float64: where it is, or on the CPU if its device has no float64."""
    return (x if has_float64(x.device) else x.cpu()).double()


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configs and manifests use: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, moments and sums where a step computes in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def encoder_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision in which training chooses latents: the one named, or for "auto" bfloat16 where that is fast."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if dtype == torch.float32 and bfloat16_is_fast(device) else dtype
