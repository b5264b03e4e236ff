"""Files of saprmarks' dictionary_learning: trainer_0/ae.pt with config.json, and checkpoints/ae_<step>.pt below it.

The tensors tell the class, but for top-k and batch top-k, which have the same: config.json tells these apart.

| class                           | activations                                                                       |
|---------------------------------|-----------------------------------------------------------------------------------|
| AutoEncoder                     | ReLU of the centred input; also of the April update, with free decoder norms      |
| AutoEncoderNew                  | ReLU, nothing subtracted (qresearch's files have the same tensors)                |
| GatedAutoEncoder                | gated                                                                             |
| AutoEncoderTopK                 | the k largest, though newer files hold a threshold too                            |
| BatchTopKSAE, MatryoshkaBatch...| above the threshold                                                               |
| JumpReluAutoEncoder             | above the thresholds, nothing subtracted                                          |

A backup (step, ae, optimizer, config, norm_factor) holds the weights of scaled activations; its biases are multiplied
by norm_factor, as the package does at the end of training.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats import folding
from sae_training.formats.found import Found
from sae_training.formats.hook_names import output_of_module
from sae_training.formats.json_files import read_above, read_object
from sae_training.formats.loaded import Given, Loaded, fitting_batch, needed, place_and_text, precisions, sizes
from sae_training.formats.pickles import copied

WEIGHTS, CONFIG = "ae.pt", "config.json"
COMPILED = "_orig_mod."  # torch.compile puts it before the names of tensors

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("standard", LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("standard", LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {
            "encoder.weight": "W_enc",
            "gate_bias": "b_enc",
            "r_mag": "r_mag",
            "mag_bias": "b_mag",
            "decoder.weight": "W_dec",
            "decoder_bias": "b_dec",
        },
    ),
    "JumpReluAutoEncoder": ("jumprelu", MATRICES | {"threshold": "log_threshold"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", MATRICES | {"threshold": "inference_threshold"}),
    "AutoEncoderTopK": ("topk", LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", LINEAR | {"b_dec": "b_dec", "threshold": "inference_threshold"}),
}
"""Our architecture, and their tensors with our names."""

NOT_CENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
NOT_WEIGHTS = ("k", "threshold", "group_sizes")
SCALED_WITH_ACTIVATIONS = ("b_enc", "b_mag", "b_dec", "log_threshold", "inference_threshold")

PLACES = {"resid": "hook_resid_post", "attn": "hook_attn_out", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}
"""Parts of a submodule's name, and the hook that has its output."""


def recognises(found: Found) -> bool:
    if found.is_folder:
        return WEIGHTS in found.names
    return found.is_pickle and class_by_tensors(state_of(found.pickle())) is not None


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The dictionary of a folder with ae.pt, or of one file. ValueError for what is missing or of no known class."""
    file = found.folder / WEIGHTS if found.is_folder else found.path
    content = found.pickle(file.name)
    state = state_of(content)
    config, trainer, unreadable = config_of(file, content)
    name = class_of(state, trainer, file)
    architecture, names = CLASSES[name]
    W_enc = state["W_enc"].T if "W_enc" in state else state["encoder.weight"]
    d_sae, d_in = W_enc.shape
    dtype = str(W_enc.dtype).removeprefix("torch.")
    values = (
        sizes(d_in, d_sae)
        | place(file, config, trainer, given)
        | {
            "architecture": architecture,
            "apply_b_dec_to_input": name not in NOT_CENTRED,
            "model_processing": "none",
            "file_format": f"dictionary_learning {name}",
            **precisions(dtype),
        }
    )
    if architecture in ("topk", "batchtopk", "matryoshka"):
        in_file = int(state["k"]) if "k" in state else trainer.get("k")
        values["k"] = needed(given.k, in_file, "k", "k", file)
    if architecture == "matryoshka":
        values["matryoshka_widths"] = tuple(accumulate(state["group_sizes"].tolist()))
    if "inference_threshold" in names.values() and "threshold" not in state:
        raise ValueError(f"{file}: threshold is missing, without which {name} is no function of single rows.")
    factor = content.get("norm_factor") if is_backup(content) else None
    told = remarks(name, state) + unreadable
    loaded = Loaded(values, partial(weights, state, names, factor), told, convention(name))
    return {file.parent.name if found.is_folder else file.stem: loaded}


def state_of(content: Any) -> dict[str, Tensor]:
    """The tensors by name of a file, or of the dictionary in a backup, also of a compiled one; {} of anything else."""
    if not isinstance(content, dict):
        return {}
    state = content["ae"] if is_backup(content) else content
    is_state = isinstance(state, dict) and all(isinstance(part, Tensor) for part in state.values())
    return {str(name).removeprefix(COMPILED): part for name, part in state.items()} if is_state else {}


def is_backup(content: dict[str, Any]) -> bool:
    return {"ae", "optimizer"} <= content.keys()


def class_by_tensors(state: dict[str, Tensor]) -> str | None:
    """The first class whose tensors these are. Of AutoEncoderTopK and BatchTopKSAE it is the former."""
    for name, (_, names) in CLASSES.items():
        optional = {*NOT_WEIGHTS} - {"threshold"} if name == "JumpReluAutoEncoder" else {*NOT_WEIGHTS}
        has_groups = ("group_sizes" in state) == (name == "MatryoshkaBatchTopKSAE")
        if has_groups and names.keys() - optional <= state.keys() <= names.keys() | {*NOT_WEIGHTS}:
            return name
    return None


def class_of(state: dict[str, Tensor], trainer: dict[str, Any], file: Path) -> str:
    name = class_by_tensors(state)
    if name is None:
        raise ValueError(f"{file}: holds {', '.join(state) or 'no tensors'}, the tensors of no class that is read.")
    if name != "AutoEncoderTopK" or "threshold" not in state:
        return name
    stated = trainer.get("dict_class")
    if stated not in ("AutoEncoderTopK", "BatchTopKSAE"):
        raise ValueError(
            f"{file}: dict_class: found {stated or 'none at all'}, expected AutoEncoderTopK or BatchTopKSAE, "
            f"whose tensors are the same; put the {CONFIG} of its training beside the file, or one with "
            f'{{"trainer": {{"dict_class": "BatchTopKSAE"}}}} or {{"trainer": {{"dict_class": "AutoEncoderTopK"}}}}.'
        )
    return stated


def weights(state: dict[str, Tensor], names: dict[str, str], norm_factor: float | None) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for theirs, name in names.items():
        is_other_way = theirs in ("decoder.weight", "W_enc")  # than it lies in our memory
        tensor = copied(state[theirs], is_other_way)
        ours[name] = tensor.T if name == "W_enc" else tensor
    if norm_factor is not None:
        for name in ours.keys() & {*SCALED_WITH_ACTIVATIONS}:
            ours[name] *= norm_factor
    if "log_threshold" in ours:
        ours["log_threshold"] = folding.log_thresholds(ours["log_threshold"])
    return ours


def remarks(name: str, state: dict[str, Tensor]) -> tuple[str, ...]:
    if CLASSES[name][0] in ("batchtopk", "matryoshka") and float(state["threshold"]) < 0:
        return ("threshold is below 0: training never set it, so every latent above 0 is active, not about k",)
    return ()


def convention(name: str) -> str:
    if name == "AutoEncoder":
        return "activations are those of the stored weights; from_pretrained there multiplies them by decoder norms"
    if name == "AutoEncoderNew":
        return "activations are those that encode gives there; forward(output_features=True) has them times norms"
    return Loaded.convention


# --------------------------------------------------------------------------------------------------------------- place


def config_of(file: Path, content: Any) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """The config of the training, its part on the trainer, and remarks: beside the file, one folder up, in a backup."""
    unreadable: tuple[str, ...] = ()
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG).is_file():
            is_beside = folder == file.parent
            config, unreadable = (read_object(folder / CONFIG), ()) if is_beside else read_above(folder / CONFIG)
            if isinstance(config.get("trainer"), dict):
                return config, config["trainer"], ()
    in_backup = content.get("config") if isinstance(content, dict) else None
    return {}, in_backup if isinstance(in_backup, dict) else {}, unreadable


def place(file: Path, config: dict[str, Any], trainer: dict[str, Any], given: Given) -> dict[str, Any]:
    """Where activations come from. `layer` is that of transformers' block whose output, or part's output, is read."""
    buffer = config.get("buffer") if isinstance(config.get("buffer"), dict) else {}
    layer = trainer.get("layer") if isinstance(trainer.get("layer"), int) else None
    submodule = str(trainer.get("submodule_name") or "")
    if not submodule:
        submodule = next((part for part in reversed(file.parts) if re.search(r"resid|mlp|att", part)), "")
    part = next((hook for word, hook in PLACES.items() if word in submodule), None)
    model = given.model_name or (trainer["lm_name"] if isinstance(trainer.get("lm_name"), str) else None)
    part = part and output_of_module(part, model)
    hook_point = f"blocks.{layer}.{part}" if layer is not None and part is not None else None
    if buffer and buffer.get("io", "out") != "out":
        is_input = buffer["io"] == "in" and part == "hook_resid_post"
        hook_point = f"blocks.{layer}.hook_resid_pre" if is_input and layer is not None else None
    values = place_and_text(given, trainer.get("lm_name"), hook_point, layer)
    if buffer and isinstance(buffer.get("ctx_len"), int):
        values |= fitting_batch(buffer["ctx_len"])
    return values
