"""What all makers of reference files share: random weights that hide no mistake, and the file of expected values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, D_OUT, N_ROWS = 8, 16, 6, 12


def random_tensors(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Tensors like those of `state`, none of whose rows, norms, biases or thresholds are equal or special."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in state.items():
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        if "threshold" in name or "scaling_factor" in name:
            values = 0.2 + 0.8 * torch.rand(tensor.shape, generator=generator)
        elif name in ("W_dec", "decoder.weight"):
            long = values.shape.index(D_SAE) if D_SAE in values.shape else 0
            sizes = 0.3 + 1.5 * torch.rand(values.shape[long], generator=generator)
            values = 0.4 * values * (sizes.unsqueeze(1) if long == 0 else sizes)
        elif values.ndim == 1:
            values = 0.3 * values
        else:
            values = 0.5 * values
        made[name] = values.to(tensor.dtype)
    return made


def inputs(d_in: int = D_IN) -> Tensor:
    """Rows (12, d_in) of unequal sizes, with a mean."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(N_ROWS, d_in, generator=generator) * torch.linspace(0.5, 4, N_ROWS).unsqueeze(1)
    return rows + 0.4


def save_expected(folder: Path, x: Tensor, acts: Tensor, out: Tensor, facts: Mapping[str, Any]) -> None:
    """Write expected.safetensors (x, acts, out) and expected.json (`given`, versions, what it is) beside the files."""
    tensors = {"x": x, "acts": acts, "out": out}
    save_file({name: t.detach().float().contiguous() for name, t in tensors.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(dict(facts), indent=2) + "\n")
