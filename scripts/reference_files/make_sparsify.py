# pyright: reportMissingImports=false
"""Write the files of sparsify that the tests read, with what sparsify itself computes from them.

    python -m venv V && V/bin/pip install eai-sparsify==1.3.3
    V/bin/python scripts/reference_files/make_sparsify.py tests/reference_files

Those of legacy configs are the same files with the old cfg.json; for `signed`, which the package no longer has, the
expected values are its old formula.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("layers.3", {"k": 4}),
    "topk-expansion-factor": ("layers.3", {"k": 4, "num_latents": 0, "expansion_factor": 2}),
    "topk-not-a-multiple": ("layers.3", {"k": 4, "num_latents": D_SAE + 4}),
    "topk-bfloat16": ("layers.3", {"k": 4}),
    "groupmax": ("layers.3", {"k": 4, "activation": "groupmax"}),
    "transcoder": ("layers.3.mlp", {"k": 4, "transcode": True}),
    "skip-transcoder": ("layers.3.mlp", {"k": 4, "transcode": True, "skip_connection": True}),
    "legacy": ("layer_3", {"k": 4, "num_latents": 0, "expansion_factor": 2}),
    "legacy-signed": ("layer_3", {"k": 4, "num_latents": 0, "expansion_factor": 2}),
}


@torch.no_grad()
def write(root: Path, name: str, place: str, options: dict[str, Any], seed: int) -> None:
    folder = root / f"sparsify-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    cfg = SparseCoderConfig(**{"num_latents": D_SAE, **options})
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    sae = SparseCoder(D_IN, cfg, dtype=dtype)
    sae.load_state_dict(random_tensors(sae.state_dict(), seed))
    sae.save_to_disk(folder / place)
    run = {"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "EleutherAI/SmolLM2-135M-10B", "ctx_len": 2048}
    (folder / "config.json").write_text(json.dumps(run | {"split": "train", "sae": cfg.to_dict()}))
    sae, x, by = sae.float(), inputs(), "sparsify"
    top = sae.encode(x)
    acts = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
    out = sae(x).sae_out
    if name.startswith("legacy"):
        old = {
            "expansion_factor": 2,
            "normalize_decoder": True,
            "k": 4,
            "signed": name.endswith("signed"),
            "d_in": D_IN,
        }
        (folder / place / "cfg.json").write_text(json.dumps(old))
    if name.endswith("signed"):
        pre = sae.encoder(x - sae.b_dec)
        chosen = pre.abs().topk(4).indices
        acts = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
        out, by = acts @ sae.W_dec + sae.b_dec, "the formula of sae of July 2024"
    facts = {"package": f"eai-sparsify {version('eai-sparsify')}", "torch": torch.__version__, "path": place}
    save_expected(folder, x, acts, out, facts | {"variant": name.replace("-", " "), "by": by})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        for number, (variant, (hookpoint, changes)) in enumerate(VARIANTS.items()):
            write(Path(sys.argv[1]), variant, hookpoint, changes, 100 + number)
