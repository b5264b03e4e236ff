"""Write files in the layouts of programs that no package runs, with expected values by their formulas in plain torch.

python scripts/reference_files/make_by_formula.py tests/reference_files
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from torch import Tensor

K = 4


def fresh(root: Path, name: str) -> Path:
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).mkdir(parents=True)
    return root / name


def write_openai(root: Path, name: str, location: str, is_topk: bool, is_tied: bool, seed: int) -> None:
    """OpenAI's sparse_autoencoder (model.py of 4965b94): LN for TopK alone, the deviation of a sample, eps inside."""
    folder = fresh(root, f"openai-{name}")
    shapes = {"pre_bias": (D_IN,), "latent_bias": (D_SAE,), "encoder.weight": (D_SAE, D_IN)}
    if not is_tied:
        shapes["decoder.weight"] = (D_IN, D_SAE)
    state: dict[str, Any] = random_tensors({key: torch.zeros(shape) for key, shape in shapes.items()}, seed)
    W_dec: Tensor = state["encoder.weight"] if is_tied else state["decoder.weight"].T
    x = inputs()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = (x - mean) / (std + 1e-5) if is_topk else x
    pre = (z - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    acts = pre.relu()
    if is_topk:
        top = pre.topk(K)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    out = acts @ W_dec + state["pre_bias"]
    if is_topk:
        out = out * std + mean
    if is_tied:
        state["decoder.linear.weight"] = state["encoder.weight"]
    state |= {"stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64), "activation": "TopK" if is_topk else "ReLU"}
    if is_topk:
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    path = folder / location / "autoencoders" / "8.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    facts = {"path": path.relative_to(folder).as_posix(), "variant": name.replace("-", " ")}
    save_expected(folder, x, acts, out, facts | {"package": "none runs", "by": "the formula, in plain torch"})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        files = Path(sys.argv[1])
        write_openai(files, "v1-relu", "mlp_post_act", is_topk=False, is_tied=False, seed=300)
        write_openai(files, "v4-relu-tied", "resid_delta_mlp_v4", is_topk=False, is_tied=True, seed=301)
        write_openai(files, "v5-topk", "resid_post_mlp_v5_32k", is_topk=True, is_tied=False, seed=302)
        write_openai(files, "v5-topk-tied", "resid_post_attn_v5_128k", is_topk=True, is_tied=True, seed=303)
