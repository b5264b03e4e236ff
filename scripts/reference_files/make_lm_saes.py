# pyright: reportMissingImports=false
"""Write files of OpenMOSS's lm_saes of 2024 and 2025, which no registry has, with what its own code computes from them.

A checkout of github.com/OpenMOSS/Language-Model-SAEs runs in an environment that has llamascopium's requirements:

    git -C Language-Model-SAEs checkout b9326392    # 2024, and de9cf25c for 2025
    PYTHONPATH=Language-Model-SAEs/src V/bin/python scripts/reference_files/make_lm_saes.py tests/reference_files 2024

Of 2024 its loader, encode and decode are run. Of 2025, whose decode leaves reconstructions in scaled units, these are
divided by the factor of its compute_norm_factor.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from lm_saes.config import SAEConfig
from lm_saes.sae import SparseAutoEncoder
from safetensors.torch import save_file

COMMITS = {"2024": "b9326392", "2025": "de9cf25c"}
PLACE = "blocks.15.hook_resid_post"
TRANSCODER = {"hook_point_in": "blocks.15.hook_resid_mid", "hook_point_out": "blocks.15.hook_mlp_out"}
AS_RELEASED = {"norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False}
NOT_COUNTED = {"sparsity_include_decoder_norm": False}
SUBTRACTS = {"apply_decoder_bias_to_pre_encoder": True}

OF_2024: dict[str, dict[str, Any]] = {
    "jumprelu": {"act_fn": "jumprelu", "jump_relu_threshold": 0.9, **AS_RELEASED},
    "jumprelu-bfloat16": {"act_fn": "jumprelu", "jump_relu_threshold": 0.9, **AS_RELEASED, "dtype": "bfloat16"},
    "jumprelu-norms-not-counted": {
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.9,
        **AS_RELEASED,
        **NOT_COUNTED,
    },
    "jumprelu-token-wise": {"act_fn": "jumprelu", "jump_relu_threshold": 0.4, "norm_activation": "token-wise"},
    "jumprelu-pickle": {"act_fn": "jumprelu", "jump_relu_threshold": 0.9, **AS_RELEASED, "file": "pruned.pt"},
    "topk": {"act_fn": "topk", "top_k": 4, **AS_RELEASED},
    "topk-with-threshold": {"act_fn": "topk", "jump_relu_threshold": 0.9, "top_k": 4, **AS_RELEASED},
    "topk-norms-not-counted": {"act_fn": "topk", "top_k": 4, **AS_RELEASED, **NOT_COUNTED},
    "relu-subtracts-b-dec": {"act_fn": "relu", **AS_RELEASED, **SUBTRACTS},
    "transcoder": {"act_fn": "jumprelu", "jump_relu_threshold": 0.9, **AS_RELEASED, **TRANSCODER},
    "transcoder-subtracts-b-dec": {"act_fn": "topk", "top_k": 4, **AS_RELEASED, **TRANSCODER, **SUBTRACTS},
}
OF_2025: dict[str, dict[str, Any]] = {
    "jumprelu": {"act_fn": "jumprelu"},
    "jumprelu-bfloat16": {"act_fn": "jumprelu", "dtype": "bfloat16"},
    "jumprelu-norms-not-counted": {"act_fn": "jumprelu", **NOT_COUNTED},
    "relu-subtracts-b-dec": {"act_fn": "relu", **SUBTRACTS},
    "transcoder": {"act_fn": "jumprelu", **TRANSCODER},
    "transcoder-subtracts-b-dec": {"act_fn": "jumprelu", **TRANSCODER, **SUBTRACTS},
}


def random_state(sae: SparseAutoEncoder, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state = random_tensors(dict(sae.state_dict()), seed)
    if "log_jumprelu_threshold" in state:
        state["log_jumprelu_threshold"] = (state["log_jumprelu_threshold"] - 0.1).log()
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def common(changes: dict[str, Any]) -> dict[str, Any]:
    return {"hook_point_in": PLACE, "d_model": D_IN, "expansion_factor": D_SAE // D_IN} | changes


def save(path: Path, state: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".pt":
        torch.save({"sae": state, "version": "1.0.0"}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


@torch.no_grad()
def write_2024(folder: Path, changes: dict[str, Any], seed: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    file, dtype = changes.pop("file", "final.safetensors"), getattr(torch, changes.pop("dtype", "float32"))
    if changes["norm_activation"] == "dataset-wise":
        is_transcoder = "hook_point_out" in changes
        changes["dataset_average_activation_norm"] = {"in": 4.3, "out": 1.7 if is_transcoder else 4.3}
    cfg = SAEConfig(**common(changes))
    cfg.save_hyperparameters(str(folder))
    (folder / "lm_config.json").write_text('{"model_name": "meta-llama/Llama-3.1-8B", "d_model": 4096}\n')
    (folder / "checkpoints").mkdir()
    state = random_state(SparseAutoEncoder(cfg), seed, dtype)
    path = folder / "checkpoints" / file
    save(path, {name: tensor.float() for name, tensor in state.items()})
    sae = SparseAutoEncoder.from_pretrained(str(folder))  # it would multiply norms and factors in bfloat16
    save(path, state)
    assert sae.encoder.weight.dtype == torch.float32
    acts = sae.encode(x)
    return acts, sae.decode(acts) / sae.compute_norm_factor(x, "out")


@torch.no_grad()
def write_2025(folder: Path, changes: dict[str, Any], seed: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = getattr(torch, changes.pop("dtype", "float32"))
    cfg = SAEConfig(**common(changes), dtype=torch.float32)
    cfg.save_hyperparameters(folder)
    written = SparseAutoEncoder(cfg)
    written.load_state_dict(random_state(written, seed, torch.float32))
    norms = {cfg.hook_point_out: 1.75, cfg.hook_point_in: 4.25}
    written.set_dataset_average_activation_norm(norms)
    save(folder / "sae_weights.safetensors", {n: t.to(dtype) for n, t in written._get_full_state_dict().items()})
    sae = SparseAutoEncoder.from_pretrained(str(folder), dtype=torch.float32)
    assert sae.encoder.weight.dtype == torch.float32
    acts = sae.encode(x)
    return acts, sae.decode(acts) / sae.compute_norm_factor(x, cfg.hook_point_out)


def write(root: Path, year: str, name: str, changes: dict[str, Any], seed: int) -> None:
    folder = root / f"llama_scope-{year}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    x = inputs()
    acts, out = (write_2024 if year == "2024" else write_2025)(folder, dict(changes), seed, x)
    by = f"lm_saes of OpenMOSS at {COMMITS[year]}"
    facts = {"package": by, "torch": torch.__version__, "path": "", "variant": f"{year}, {name.replace('-', ' ')}"}
    save_expected(folder, x, acts, out, facts | {"by": by})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        made_in = sys.argv[2]
        variants, first_seed = (OF_2024, 640) if made_in == "2024" else (OF_2025, 660)
        for number, (variant, its_changes) in enumerate(variants.items()):
            write(Path(sys.argv[1]), made_in, variant, its_changes, first_seed + number)
