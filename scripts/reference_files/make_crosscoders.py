# pyright: reportMissingImports=false
"""Write crosscoders and cross-layer transcoders that the tests read, with what their own programs compute from them.

V/bin/pip install circuit-tracer==0.5.0 (or llamascopium==2.0.0b34) in a venv V of its own for each of the first two
V/bin/python scripts/reference_files/make_crosscoders.py tests/reference_crosscoders circuit_tracer
V/bin/python scripts/reference_files/make_crosscoders.py tests/reference_crosscoders llamascopium
python scripts/reference_files/make_crosscoders.py tests/reference_crosscoders layouts

Those of dictionary_learning's forks are made by make_forks.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import D_IN, D_SAE, N_ROWS, save_expected
from safetensors.torch import save_file
from torch import Tensor

N, K = 3, 4
Tensors = dict[str, Tensor]


class Numbers:
    """Random tensors none of whose rows, norms, biases or thresholds are equal or special."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, size: float = 0.5) -> Tensor:
        return size * torch.randn(shape, generator=self.generator)

    def decoder(self, *shape: int, axis: int) -> Tensor:
        """A decoder whose latents, along `axis`, have unequal norms."""
        sizes = 0.3 + 1.5 * torch.rand(shape[axis], generator=self.generator)
        return self.tensor(*shape, size=0.4) * sizes.view([-1 if i == axis else 1 for i in range(len(shape))])

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def rows(self) -> Tensor:
        """Activations (rows, places, d) of unequal sizes, with a mean."""
        sizes = torch.linspace(0.5, 3, N_ROWS).view(-1, 1, 1) * torch.linspace(0.7, 1.4, N).view(1, -1, 1)
        return torch.randn(N_ROWS, N, D_IN, generator=self.generator) * sizes + 0.4


def fresh(root: Path, name: str) -> Path:
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------------------ circuit-tracer


def circuit_tracer(root: Path) -> None:
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt

    for name, activation, seed in (("relu", "relu", 1), ("jumprelu", "jump_relu", 2)):
        numbers, folder = Numbers(seed), fresh(root, f"circuit_tracer-clt-{name}")
        made = CrossLayerTranscoder(
            N, D_SAE, D_IN, activation, lazy_decoder=False, dtype=torch.float32, device=torch.device("cpu")
        )
        state = {
            "W_enc": numbers.tensor(N, D_SAE, D_IN),
            "b_enc": numbers.tensor(N, D_SAE, size=0.3),
            "b_dec": numbers.tensor(N, D_IN, size=0.3),
        }
        state |= {f"W_dec.{i}": numbers.decoder(D_SAE, N - i, D_IN, axis=0) for i in range(N)}
        if name == "jumprelu":  # some below 0, which let activations below 0 through
            state["activation_function.threshold"] = numbers.between(-0.3, 1, N, 1, D_SAE)
        made.load_state_dict(state)
        made.to_safetensors(str(folder))
        (folder / "config.yaml").write_text(
            "model_name: google/gemma-2-2b\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\n"
            "feature_output_hook: hook_mlp_out\nscan: made\n"
        )
        loaded = load_clt(str(folder), dtype=torch.float32, device=torch.device("cpu"), lazy_decoder=False)
        x = numbers.rows()
        acts = loaded.encode(x.transpose(0, 1))
        out = loaded.decode(acts)
        facts = {"package": f"circuit-tracer {version('circuit-tracer')}", "by": "circuit-tracer"}
        save(folder, x, acts.transpose(0, 1), out.transpose(0, 1), facts)


# -------------------------------------------------------------------------------------------------------- llamascopium

VARIANTS: dict[str, dict[str, Any]] = {
    "crosscoder-relu": {"act_fn": "relu", "norm_activation": "dataset-wise"},
    "crosscoder-jumprelu": {"act_fn": "jumprelu", "norm_activation": "dataset-wise"},
    "crosscoder-topk": {"act_fn": "topk", "norm_activation": "inference"},
    "crosscoder-batchtopk": {"act_fn": "batchtopk", "norm_activation": "dataset-wise"},
    "crosscoder-token-wise": {"act_fn": "topk", "norm_activation": "token-wise"},
    "clt-relu": {"act_fn": "relu", "norm_activation": "dataset-wise"},
    "clt-jumprelu": {"act_fn": "jumprelu", "norm_activation": "inference"},
    "clt-jumprelu-without-norms": {
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": False,
    },
    "clt-topk": {"act_fn": "topk", "norm_activation": "dataset-wise"},
    "clt-layertopk": {"act_fn": "layertopk", "norm_activation": "inference"},
    "clt-batchtopk": {"act_fn": "batchtopk", "norm_activation": "inference"},
    "clt-batchlayertopk": {"act_fn": "batchlayertopk", "norm_activation": "dataset-wise"},
    "crosscoder-jumprelu-folded": {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "fold": True},
    "clt-jumprelu-folded": {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "fold": True},
    "clt-topk-folded-after-its-config": {
        "act_fn": "topk",
        "norm_activation": "dataset-wise",
        "fold": "after the config",
    },
}


def llamascopium(root: Path) -> None:
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig

    for number, (name, options) in enumerate(VARIANTS.items()):
        numbers, folder, options = Numbers(20 + number), fresh(root, f"llamascopium-{name}"), dict(options)
        fold = options.pop("fold", False)
        is_clt = name.startswith("clt")
        reads = [f"blocks.{i + 2}.{'hook_resid_mid' if is_clt else 'hook_resid_post'}" for i in range(N)]
        writes = [f"blocks.{i + 2}.hook_mlp_out" for i in range(N)] if is_clt else reads
        common = {"d_model": D_IN, "expansion_factor": D_SAE / D_IN, "top_k": K, "device": "cpu", **options}
        if is_clt:
            made = CrossLayerTranscoder(CLTConfig(hook_points_in=reads, hook_points_out=writes, **common))
        else:
            made = Crosscoder(CrosscoderConfig(hook_points=reads, **common))
        made.load_state_dict({name: scopium_values(name, t, numbers) for name, t in made.state_dict().items()})
        if options["norm_activation"] == "dataset-wise":
            norms = {place: float(numbers.between(1.5, 6, 1)) for place in dict.fromkeys(reads + writes)}
            made.set_dataset_average_activation_norm(norms)
        if fold != "after the config":
            made.save_pretrained(folder, fold_activation_scale=bool(fold))
        made.cfg.save_hyperparameters(folder)
        if fold == "after the config":  # as its train_clt does
            made.save_pretrained(folder, fold_activation_scale=True)
        x = numbers.rows()
        batch = dict(zip(reads, x.unbind(1), strict=True))
        batch |= {place: torch.ones(N_ROWS, D_IN) for place in writes if place not in batch}
        scaled, factors = made.normalize_activations(batch, return_scale_factor=True)
        acts = made.encode(made.prepare_input(scaled)[0])
        out = made.decode(acts, **({"batch_first": True} if is_clt else {}))
        out = torch.stack([out[:, i] / factors[place] for i, place in enumerate(writes)], dim=1)
        facts: dict[str, Any] = {"package": f"llamascopium {version('llamascopium')}", "by": "llamascopium"}
        if fold == "after the config":
            facts["given"] = {"norm_factor": 1.0}
        save(folder, x, acts, out, facts)


def scopium_values(name: str, tensor: Tensor, numbers: Numbers) -> Tensor:
    if name.startswith("W_D"):
        return numbers.decoder(*tensor.shape, axis=1)
    if "threshold" in name:
        return numbers.between(0.1, 0.8, *tensor.shape).log()
    return numbers.tensor(*tensor.shape, size=0.3 if name.startswith("b") else 0.5)


# ------------------------------------------------------------------------------------------------------------- layouts


def gemma(folder: Path, numbers: Numbers, x: Tensor, place: str, is_affine: bool) -> tuple[str, Tensor, Tensor]:
    """acts[l] = jumprelu(x[l] w_enc[l] + b_enc[l]), and out[k] = sum of acts[l] w_dec[l, k] + b_dec[k]."""
    acts, out = [], torch.zeros(N_ROWS, N, D_IN)
    (folder / place).mkdir(parents=True)
    for i in range(N):
        state = {
            "w_enc": numbers.tensor(D_IN, D_SAE),
            "b_enc": numbers.tensor(D_SAE, size=0.3),
            "threshold": numbers.between(-0.2, 1, D_SAE),
            "w_dec": numbers.decoder(D_SAE, N, D_IN, axis=0),
            "b_dec": numbers.tensor(D_IN, size=0.3),
        }
        state["w_dec"][:, :i] = 0
        state |= {"affine_skip_connection": numbers.tensor(D_IN, D_IN)} if is_affine else {}
        save_file(state, folder / place / f"params_layer_{i}.safetensors")
        pre = x[:, i] @ state["w_enc"] + state["b_enc"]
        acts.append(pre.relu() * (pre > state["threshold"]))
        out += torch.einsum("bm,mkd->bkd", acts[-1], state["w_dec"])
        out[:, i] += state["b_dec"]
        if is_affine:
            out[:, i] += x[:, i] @ state["affine_skip_connection"]
    return place, torch.stack(acts, dim=1), out


def kissane(folder: Path, numbers: Numbers, x: Tensor) -> tuple[str, Tensor, Tensor]:
    state = {
        "W_enc": numbers.tensor(N, D_IN, D_SAE),
        "W_dec": numbers.decoder(D_SAE, N, D_IN, axis=0),
        "b_enc": numbers.tensor(D_SAE, size=0.3),
        "b_dec": numbers.tensor(N, D_IN, size=0.3),
    }
    torch.save(state, folder / "cc_weights.pt")
    config = {"d_in": D_IN, "dict_size": D_SAE, "enc_dtype": "fp32", "hook_point": "blocks.14.hook_resid_pre"}
    (folder / "cfg.json").write_text(json.dumps(config))
    acts = (torch.einsum("bmd,mdn->bn", x, state["W_enc"]) + state["b_enc"]).relu()
    return "", acts, torch.einsum("bn,nmd->bmd", acts, state["W_dec"]) + state["b_dec"]


LAYOUTS: dict[str, tuple[Callable[..., tuple[str, Tensor, Tensor]], dict[str, Any]]] = {
    "gemma_scope_2-crosscoder": (
        gemma,
        {"place": "gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_width_65k_l0_medium", "is_affine": False},
    ),
    "gemma_scope_2-clt": (gemma, {"place": "gemma-scope-2-270m-it/clt/width_262k_l0_big", "is_affine": False}),
    "gemma_scope_2-clt-affine": (
        gemma,
        {"place": "gemma-scope-2-1b-pt/clt/width_262k_l0_big_affine", "is_affine": True},
    ),
    "kissane-crosscoder": (kissane, {}),
}


def layouts(root: Path) -> None:
    for number, (name, (make, options)) in enumerate(LAYOUTS.items()):
        numbers, folder = Numbers(60 + number), fresh(root, name)
        x = numbers.rows()
        path, acts, out = make(folder, numbers, x, **options)
        facts = {"package": f"none: written to the layout of {name.split('-')[0]}", "by": "the formula in plain torch"}
        save(folder, x, acts, out, facts | {"path": path})


def save(folder: Path, x: Tensor, acts: Tensor, out: Tensor, facts: dict[str, Any]) -> None:
    variant = folder.name.partition("-")[2].replace("-", " ")
    save_expected(folder, x, acts, out, {"path": "", "variant": variant, "torch": torch.__version__, **facts})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), torch.no_grad():
        to, which = Path(sys.argv[1]), sys.argv[2]
        {"circuit_tracer": circuit_tracer, "llamascopium": llamascopium, "layouts": layouts}[which](to)
