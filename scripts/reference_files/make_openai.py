# pyright: reportMissingImports=false
"""Write files of OpenAI's sparse_autoencoder, which no registry has, with what its own code computes from them.

    git -C sparse_autoencoder checkout 4965b94      # of github.com/openai/sparse_autoencoder
    PYTHONPATH=sparse_autoencoder V/bin/python scripts/reference_files/make_openai.py tests/reference_files

V needs torch alone. Files of versions 2 and 3 were never published: theirs are as those of version 1, at their paths.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from sparse_autoencoder.model import ACTIVATIONS_CLASSES, Autoencoder, TopK

BY = "sparse_autoencoder of OpenAI at 4965b94"
TIED = "decoder.linear.weight"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1-relu": ("mlp_post_act", {}),
    "v1-relu-without-activation": ("mlp_post_act", {"says_activation": False}),
    "v1-relu-float64": ("mlp_post_act", {"dtype": torch.float64}),
    "v2-relu": ("resid_delta_mlp_v2", {}),
    "v3-relu-tied": ("mlp_post_act_v3", {"tied": True}),
    "v4-relu-tied": ("resid_delta_mlp_v4", {"tied": True}),
    "v5-topk": ("resid_post_mlp_v5_32k", {"k": 4}),
    "v5-topk-tied": ("resid_post_attn_v5_128k", {"k": 4, "tied": True}),
    "v5-topk-more-than-positive": ("resid_delta_attn_v5_32k", {"k": 14}),
    "v1-identity": ("resid_delta_mlp", {"postact": "Identity"}),
    "v5-topk-identity": ("resid_post_mlp_v5_128k", {"k": 14, "postact": "Identity"}),
}


@torch.no_grad()
def write(
    root: Path,
    name: str,
    location: str,
    seed: int,
    k: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    says_activation: bool = True,
    postact: str = "ReLU",
) -> None:
    folder = root / f"openai-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    above = ACTIVATIONS_CLASSES[postact]()
    activation = above if k is None else TopK(k, above)
    model = Autoencoder(D_SAE, D_IN, activation, tied=tied, normalize=k is not None)
    parameters = {name: part for name, part in model.named_parameters() if name != TIED}
    for part_name, made in random_tensors(parameters, seed).items():
        parameters[part_name].copy_(made)
    model = model.to(dtype)
    state = dict(model.state_dict())
    if not says_activation:  # as before June 2024
        del state["activation"], state["activation_state_dict"]
    path = folder / location / "autoencoders" / "8.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    x = inputs()
    acts, info = model.encode(x.to(dtype))
    variant = name.replace("-", " ") + (", as of v1" if name.startswith(("v2", "v3")) else "")
    facts = {"path": path.relative_to(folder).as_posix(), "variant": variant, "package": BY, "by": BY}
    save_expected(folder, x, acts, model.decode(acts, info), facts)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        for number, (variant, (its_location, options)) in enumerate(VARIANTS.items()):
            write(Path(sys.argv[1]), variant, its_location, 300 + number, **options)
