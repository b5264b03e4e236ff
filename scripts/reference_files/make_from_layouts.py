"""Write files in the layouts of programs that no registry has, with values of their formulas in plain torch.

python scripts/reference_files/make_from_layouts.py tests/reference_files
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import D_IN, D_SAE, inputs, random_tensors, save_expected
from safetensors.torch import save_file
from torch import Tensor

K = 4
Tensors = dict[str, Tensor]
Values = tuple[Tensor, Tensor]  # latent activations and outputs

BIASES = {"b_enc": (D_SAE,), "b_dec": (D_IN,), "threshold": (D_SAE,)}
MATRICES = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN)}
LINEAR = {
    "encoder.weight": (D_SAE, D_IN),
    "encoder.bias": (D_SAE,),
    "decoder.weight": (D_IN, D_SAE),
    "decoder.bias": (D_IN,),
}


def tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    return random_tensors({name: torch.empty(shape) for name, shape in shapes.items()}, seed)


def above(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre.relu() * (pre > threshold)


def largest(pre: Tensor, k: int) -> Tensor:
    top = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


# --------------------------------------------------------------------------------------------------------------- OpenAI

# ---------------------------------------------------------------------------------------------------------- Gemma Scope


def save_npz(file: Path, arrays: Tensors, is_compressed: bool = False) -> None:
    plain = {name: tensor.numpy() for name, tensor in arrays.items()}
    with file.open("wb") as to:
        (np.savez_compressed if is_compressed else np.savez)(to, allow_pickle=False, **plain)


def gemma_scope_1(file: Path, x: Tensor, seed: int, is_lower: bool = False, is_compressed: bool = False) -> Values:
    state = tensors(MATRICES | BIASES, seed)
    save_npz(file, {n.replace("W_", "w_") if is_lower else n: t for n, t in state.items()}, is_compressed)
    scale = D_IN**0.5 if "embedding" in file.parts else 1.0
    acts = above(x / scale @ state["W_enc"] + state["b_enc"], state["threshold"])
    return acts, (acts @ state["W_dec"] + state["b_dec"]) * scale


def gemma_scope_2(file: Path, x: Tensor, seed: int, hooks: tuple[str, str], is_affine: bool = False) -> Values:
    state = tensors({n.replace("W_", "w_"): s for n, s in (MATRICES | BIASES).items()}, seed)
    skip = tensors({"affine_skip_connection": (D_IN, D_IN)}, seed + 1) if is_affine else {}
    save_file(state | skip, file)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": is_affine}
    config |= dict(zip(("hf_hook_point_in", "hf_hook_point_out"), hooks, strict=True))
    (file.parent / "config.json").write_text(json.dumps(config))
    acts = above(x @ state["w_enc"] + state["b_enc"], state["threshold"])
    out = acts @ state["w_dec"] + state["b_dec"]
    return acts, out + x @ skip["affine_skip_connection"] if is_affine else out


# --------------------------------------------------------------------------------------------------------- single files


def goodfire(file: Path, x: Tensor, seed: int) -> Values:
    named = {name: name.replace(".", "_linear.") for name in LINEAR}
    made = {named[n]: t.bfloat16() for n, t in tensors(LINEAR, seed).items()}
    torch.save(made, file)
    state = {name: tensor.float() for name, tensor in made.items()}
    acts = (x @ state["encoder_linear.weight"].T + state["encoder_linear.bias"]).relu()
    return acts, acts @ state["decoder_linear.weight"].T + state["decoder_linear.bias"]


def qresearch(file: Path, x: Tensor, seed: int) -> Values:
    state = tensors(LINEAR, seed)
    torch.save(state, file)
    acts = (x @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    return acts, acts @ state["decoder.weight"].T + state["decoder.bias"]


def qwen_scope(file: Path, x: Tensor, seed: int, d_sae: int = D_SAE) -> Values:
    shapes = {"W_enc": (d_sae, D_IN), "W_dec": (D_IN, d_sae), "b_enc": (d_sae,), "b_dec": (D_IN,)}
    state = tensors(shapes, seed)
    torch.save(state, file)
    acts = largest(x @ state["W_enc"].T + state["b_enc"], K)
    return acts, acts @ state["W_dec"].T + state["b_dec"]


def attention_sae(file: Path, x: Tensor, seed: int) -> Values:
    state = tensors({name: shape for name, shape in (MATRICES | BIASES).items() if name != "threshold"}, seed)
    torch.save(state, file)
    config = {"act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE, "l1_coeff": 1.0}
    file.with_name(f"{file.stem}_cfg.json").write_text(json.dumps(config))
    acts = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    return acts, acts @ state["W_dec"] + state["b_dec"]


# ------------------------------------------------------------------------------------------------------------------ all

Maker = Callable[..., Values]
FIRST = "gemma-scope-2b-pt-{}/layer_20/width_16k/average_l0_71/params.npz"
SECOND = "gemma-scope-2-1b-pt/{}/params.safetensors"
OUT, NORMED = "model.layers.13.output", "model.layers.13.{}_feedforward_layernorm.output"

MADE: dict[str, tuple[str, Maker, dict[str, Any], dict[str, Any]]] = {
    # name: the file, its maker, the maker's options, what a caller must give
    "gemma_scope_1-res": (FIRST.format("res"), gemma_scope_1, {}, {}),
    "gemma_scope_1-att-lower-case": (FIRST.format("att"), gemma_scope_1, {"is_lower": True}, {}),
    "gemma_scope_1-transcoder": (FIRST.format("transcoders"), gemma_scope_1, {"is_compressed": True}, {}),
    "gemma_scope_1-embedding": (
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6/params.npz",
        gemma_scope_1,
        {},
        {},
    ),
    "gemma_scope_2-resid-post": (
        SECOND.format("resid_post/layer_13_width_16k_l0_small"),
        gemma_scope_2,
        {"hooks": (OUT, OUT)},
        {},
    ),
    "gemma_scope_2-transcoder": (
        SECOND.format("transcoder_all/layer_13_width_16k_l0_small"),
        gemma_scope_2,
        {"hooks": (NORMED.format("pre"), NORMED.format("post"))},
        {},
    ),
    "gemma_scope_2-transcoder-affine": (
        SECOND.format("transcoder_all/layer_13_width_16k_l0_small_affine"),
        gemma_scope_2,
        {"hooks": (NORMED.format("pre"), NORMED.format("post")), "is_affine": True},
        {},
    ),
    "goodfire-relu-bfloat16": ("Llama-3.1-8B-Instruct-SAE-l19.pth", goodfire, {}, {}),
    "qresearch-relu": ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", qresearch, {}, {}),
    "qwen_scope-topk": (f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/layer7.sae.pt", qwen_scope, {}, {}),
    "qwen_scope-square": ("layer7.sae.pt", qwen_scope, {"d_sae": D_IN}, {"k": K}),
    "attention_saes-hook-z": ("gpt2-small_L5_Hcat_z.pt", attention_sae, {}, {}),
}


@torch.no_grad()
def write(root: Path, name: str, seed: int) -> None:
    path, make, options, given = MADE[name]
    folder, x = root / name, inputs()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / path).parent.mkdir(parents=True)
    acts, out = make(folder / path, x, seed, **options)
    facts = {
        "package": f"none: written to the layout of {name.split('-')[0]}",
        "torch": torch.__version__,
        "path": path,
        "variant": name.partition("-")[2].replace("-", " "),
        "by": "the formula in plain torch",
    }
    save_expected(folder, x, acts, out, facts | ({"given": given} if given else {}))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        for number, made in enumerate(MADE):
            write(Path(sys.argv[1]), made, 300 + 10 * number)
