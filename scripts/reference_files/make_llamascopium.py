# pyright: reportMissingImports=false
"""Write the files of llamascopium that the tests read, with what it computes from them itself.

python -m venv V && V/bin/pip install llamascopium==2.0.0b34
V/bin/python scripts/reference_files/make_llamascopium.py tests/reference_files

What a user calls is run: normalize_activations, encode, decode, denormalize_activations. Of a transcoder the factor of
its targets is that of the data set, or 1 where it would be that of the target's row (token-wise).
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

PLACE = "blocks.15.hook_resid_post"
TRANSCODER = {"hook_point_in": "blocks.15.ln2.hook_normalized", "hook_point_out": "blocks.15.hook_mlp_out"}

VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {"act_fn": "relu"},
    "relu-norms-not-counted": {"act_fn": "relu", "sparsity_include_decoder_norm": False},
    "jumprelu": {"act_fn": "jumprelu"},
    "jumprelu-norms-not-counted": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
    "jumprelu-bfloat16": {"act_fn": "jumprelu", "dtype": torch.bfloat16},
    "jumprelu-token-wise": {"act_fn": "jumprelu", "norm_activation": "token-wise"},
    "jumprelu-folded": {"act_fn": "jumprelu", "fold": True},
    "jumprelu-pickle": {"act_fn": "jumprelu", "file": "sae_weights.pt"},
    "jumprelu-transcoder": {"act_fn": "jumprelu", **TRANSCODER},
    "topk": {"act_fn": "topk", "top_k": 4},
    "topk-norms-not-counted": {"act_fn": "topk", "top_k": 4, "sparsity_include_decoder_norm": False},
    "topk-more-than-positive": {"act_fn": "topk", "top_k": 14},
    "topk-token-wise": {"act_fn": "topk", "top_k": 4, "norm_activation": "token-wise"},
    "topk-no-decoder-bias": {"act_fn": "topk", "top_k": 4, "use_decoder_bias": False},
    "topk-not-a-multiple": {"act_fn": "topk", "top_k": 4, "expansion_factor": 2.4},
    "topk-square": {"act_fn": "topk", "top_k": 4, "expansion_factor": 1.0},
    "topk-transcoder": {"act_fn": "topk", "top_k": 4, **TRANSCODER},
    "topk-transcoder-folded": {"act_fn": "topk", "top_k": 4, **TRANSCODER, "fold": True},
    "topk-folded-after-its-config": {"act_fn": "topk", "top_k": 4, "fold": "after the config"},
    "jumprelu-folded-after-its-config": {"act_fn": "jumprelu", "fold": "after the config"},
    "jumprelu-transcoder-folded": {"act_fn": "jumprelu", **TRANSCODER, "fold": True},
    "jumprelu-folded-bfloat16": {"act_fn": "jumprelu", "dtype": torch.bfloat16, "fold": True},
}


def built(changes: dict[str, Any], seed: int) -> SparseAutoEncoder:
    config = {
        "sae_type": "sae",
        "hook_point_in": PLACE,
        "hook_point_out": PLACE,
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "norm_activation": "dataset-wise",
        **changes,
    }
    sae = SparseAutoEncoder(SAEConfig(**config))
    state = random_tensors({name.replace("W_D", "W_dec"): t for name, t in sae.state_dict().items()}, seed)
    state = {name.replace("W_dec", "W_D"): t for name, t in state.items()}
    for name in state:
        if name.endswith("log_jumprelu_threshold"):
            state[name] = (state[name].float() - 0.1).log().to(state[name].dtype)
    sae.load_state_dict(state)
    sae.set_dataset_average_activation_norm({sae.cfg.hook_point_in: 4.0, sae.cfg.hook_point_out: 1.75})
    if sae.cfg.hook_point_in == sae.cfg.hook_point_out:
        sae.set_dataset_average_activation_norm({sae.cfg.hook_point_in: 4.0})
    return sae


@torch.no_grad()
def run(sae: SparseAutoEncoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and reconstructions in the units of the model."""
    place_in, place_out = sae.cfg.hook_point_in, sae.cfg.hook_point_out
    batch, factors = sae.normalize_activations({place_in: x}, return_scale_factor=True)
    acts = sae.encode(batch[place_in])
    if place_out != place_in:
        factors[place_out] = sae.compute_norm_factor(torch.ones(1), place_out)
    out = sae.denormalize_activations({place_out: sae.decode(acts)}, {place_out: factors[place_out]})[place_out]
    return acts, out


@torch.no_grad()
def write(root: Path, name: str, changes: dict[str, Any], seed: int) -> None:
    folder = root / f"llama_scope-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    changes = dict(changes)
    fold, file = changes.pop("fold", False), changes.pop("file", "sae_weights.safetensors")
    sae = built(changes, seed)
    given: dict[str, Any] = {}
    if fold == "after the config":  # as its train_sae does
        sae.cfg.save_hyperparameters(folder)
        given["norm_factor"] = 1.0
    if fold:
        sae.standardize_parameters_of_dataset_norm()
    if fold != "after the config":
        sae.cfg.save_hyperparameters(folder)
    sae.save_checkpoint(folder / file)
    x = inputs()
    loaded = sae
    if not given:  # what its loader makes of the file, in float32
        loaded = SparseAutoEncoder.from_pretrained(str(folder))
        assert loaded.W_E.dtype == torch.float32
    acts, out = run(loaded, x)
    facts = {
        "package": f"llamascopium {version('llamascopium')}",
        "torch": torch.__version__,
        "path": "",
        "variant": f"2, {name.replace('-', ' ')}",
        "by": f"llamascopium {version('llamascopium')}",
        "given": given,
    }
    save_expected(folder, x, acts, out, facts)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        for number, (variant, its_changes) in enumerate(VARIANTS.items()):
            write(Path(sys.argv[1]), variant, its_changes, 600 + number)
