# pyright: reportMissingImports=false
"""Write the files of dictionary_learning that the tests read, with what it computes from them itself.

python -m venv V && V/bin/pip install dictionary-learning==0.1.0
V/bin/python scripts/reference_files/make_dictionary_learning.py tests/reference_files
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

K, GROUPS, FACTOR = 4, [2, 4, D_SAE - 6], 3.5

MADE: dict[str, Any] = {
    "autoencoder": lambda: AutoEncoder(D_IN, D_SAE),
    "autoencoder-april-update": lambda: AutoEncoder(D_IN, D_SAE),
    "autoencoder-new": lambda: AutoEncoderNew(D_IN, D_SAE),
    "autoencoder-square": lambda: AutoEncoder(D_IN, D_IN),
    "gated": lambda: GatedAutoEncoder(D_IN, D_SAE),
    "jumprelu": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
    "topk": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "topk-without-threshold": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "topk-without-k": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "batchtopk": lambda: BatchTopKSAE(D_IN, D_SAE, K),
    "batchtopk-never-set": lambda: BatchTopKSAE(D_IN, D_SAE, K),
    "matryoshka": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, GROUPS),
    "backup-topk": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "backup-batchtopk": lambda: BatchTopKSAE(D_IN, D_SAE, K),
    "backup-gated": lambda: GatedAutoEncoder(D_IN, D_SAE),
    "backup-jumprelu": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
    "checkpoint": lambda: AutoEncoder(D_IN, D_SAE),
}


@torch.no_grad()
def write(root: Path, name: str, seed: int) -> None:
    folder = root / f"dictionary_learning-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "resid_post_layer_3" / "trainer_0"
    place.mkdir(parents=True)
    sae, x = MADE[name](), inputs()
    fixed = {key: value for key, value in sae.state_dict().items() if key in ("k", "group_sizes")}
    sae.load_state_dict(random_tensors(sae.state_dict(), seed) | fixed)
    if name == "batchtopk-never-set":
        sae.threshold.fill_(-1.0)
    trainer = {
        "trainer_class": "StandardTrainer",
        "dict_class": type(sae).__name__,
        "activation_dim": D_IN,
        "dict_size": sae.dict_size,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
        **({"k": K} if "k" in fixed else {}),
    }
    buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 100, "ctx_len": 128, "device": "cuda:0"}
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=4))
    state: Any = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    file = place / "ae.pt"
    if name.startswith("topk-without"):
        del state["threshold"]
    if name == "topk-without-k":
        del state["k"]
    if name.startswith("backup"):
        optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in sae.parameters()])
        state = {"step": 10, "ae": state, "optimizer": optimizer.state_dict(), "config": trainer, "norm_factor": FACTOR}
        sae.scale_biases(FACTOR)
    if name == "checkpoint":
        file = place / "checkpoints" / "ae_1000.pt"
        file.parent.mkdir()
    torch.save(state, file)
    acts = sae.encode(x)
    facts = {
        "package": f"dictionary-learning {version('dictionary-learning')}",
        "torch": torch.__version__,
        "path": (file if name == "checkpoint" else place).relative_to(folder).as_posix(),
        "variant": name.replace("-", " "),
        "by": "dictionary_learning",
    }
    save_expected(folder, x, acts, sae.decode(acts), facts)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        for number, variant in enumerate(MADE):
            write(Path(sys.argv[1]), variant, 200 + number)
