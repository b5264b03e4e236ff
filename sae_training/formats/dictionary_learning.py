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
by norm_factor, as the package does at the end of training. Forks save model.safetensors too, and a normaliser of
activations with a BatchTopKSAE, which becomes part of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.formats import folding
from sae_training.formats.found import Found
from sae_training.formats.hook_names import output_of_module
from sae_training.formats.json_files import read_above, read_object
from sae_training.formats.loaded import (
    Given,
    Loaded,
    factor_in,
    fitting_batch,
    needed,
    place_and_text,
    precisions,
    sizes,
)
from sae_training.formats.normaliser import LEAST, NAMES, Normaliser, check_normaliser, normaliser_in
from sae_training.formats.pickles import copied

WEIGHTS, OF_FORKS, CONFIG = "ae.pt", "model.safetensors", "config.json"
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
MOST_READ = 2**20  # values of these, and of a normaliser; other tensors are read when they are used
SCALED_WITH_ACTIVATIONS = ("b_enc", "b_mag", "b_dec", "log_threshold", "inference_threshold")

PLACES = {"resid": "hook_resid_post", "attn": "hook_attn_out", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}
"""Parts of a submodule's name, and the hook that has its output."""


def recognises(found: Found) -> bool:
    if found.is_folder and WEIGHTS in found.names:
        return True
    file = file_of(found)
    return file is not None and class_by_tensors(state_at(found, file)) is not None


def file_of(found: Found) -> str | None:
    """The file of weights of a folder, or the file itself; None if it is of another kind."""
    if found.is_folder:
        return next((name for name in (WEIGHTS, OF_FORKS) if name in found.names), None)
    return found.path.name if found.is_pickle or found.path.name == OF_FORKS else None


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The dictionary of a folder, or of one file. ValueError for what is missing or of no known class."""
    name_of_file = file_of(found)
    assert name_of_file is not None, "recognises() was true"
    file, content = found.folder / name_of_file, content_of(found, name_of_file)
    state = state_at(found, name_of_file)
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
    normaliser = normaliser_of(state, d_in)
    told = remarks(name, state) + unreadable + (normaliser.remarks if normaliser else ())
    read_state = partial(whole_state, found, file.name, state)
    counts_norms = file.name == OF_FORKS and architecture in ("gated", "jumprelu")  # as encode of forks has it
    made = partial(weights, read_state, names, norm_factor_of(content, file), normaliser, counts_norms)
    is_of_folder = found.is_folder or file.name == OF_FORKS
    name_of_one = file.parent.absolute().name if is_of_folder else file.stem
    return {name_of_one: Loaded(values, made, told, convention(name))}


def content_of(found: Found, file: str) -> Any:
    """What a pickle holds; {} of a .safetensors, which has nothing but tensors."""
    return {} if file == OF_FORKS else found.pickle(file)


def state_at(found: Found, file: str) -> dict[str, Tensor]:
    """The tensors by name; of a .safetensors those of weights without their values."""
    if file != OF_FORKS:
        return state_of(found.pickle(file))
    head = found.header(file)
    state: dict[str, Tensor] = {}
    for theirs, shape in head.shapes.items():
        name, dtype = theirs.removeprefix(COMPILED), getattr(torch, head.dtypes[theirs], None)
        is_read = name in (*NOT_WEIGHTS, *NAMES) and math.prod(shape) <= MOST_READ
        parts = (part for _, part in found.slices(file, theirs)) if is_read else ()
        state[name] = torch.cat([*parts]).reshape(shape) if is_read else torch.empty(shape, dtype=dtype, device="meta")
    return state


def whole_state(found: Found, file: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their values; those of a pickle are in the file until they are used."""
    if file != OF_FORKS:
        return dict(state)
    return {name.removeprefix(COMPILED): tensor for name, tensor in found.tensors(file).items()}


def normaliser_of(state: dict[str, Tensor], d_in: int) -> Normaliser | None:
    found = {name: state[name] for name in NAMES if name in state}
    check_normaliser({name: tuple(tensor.shape) for name, tensor in found.items()}, (d_in,))
    return normaliser_in(found, (d_in,))


def norm_factor_of(content: Any, file: Path) -> float | None:
    """What a backup's training divided activations by; None: nothing. ValueError unless it is a number above 0."""
    if not is_backup(content):
        return None
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    factor = content.get("norm_factor", config.get("norm_factor"))
    if isinstance(factor, Tensor) and factor.numel() == 1:
        factor = factor.item()
    return None if factor is None else factor_in(factor, f"{file}: norm_factor")


def state_of(content: Any) -> dict[str, Tensor]:
    """The tensors by name of a file, or of the dictionary in a backup, also of a compiled one; {} of anything else."""
    if not isinstance(content, dict):
        return {}
    state = content["ae"] if is_backup(content) else content
    is_state = isinstance(state, dict) and all(isinstance(part, Tensor) for part in state.values())
    return {str(name).removeprefix(COMPILED): part for name, part in state.items()} if is_state else {}


def is_backup(content: Any) -> bool:
    return isinstance(content, dict) and {"ae", "optimizer"} <= content.keys()


def class_by_tensors(state: dict[str, Tensor]) -> str | None:
    """The first class whose tensors these are. Of AutoEncoderTopK and BatchTopKSAE it is the former.

    A normaliser is part of a BatchTopKSAE only.
    """
    if not state.keys().isdisjoint(NAMES):
        rest = class_by_tensors({name: tensor for name, tensor in state.items() if name not in NAMES})
        return "BatchTopKSAE" if rest == "AutoEncoderTopK" and "threshold" in state else None
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


def weights(
    read_state: Callable[[], dict[str, Tensor]],
    names: dict[str, str],
    norm_factor: float | None,
    normaliser: Normaliser | None,
    counts_norms: bool,
) -> dict[str, Tensor]:
    state = read_state()
    ours: dict[str, Tensor] = {}
    for theirs, name in names.items():
        is_other_way = theirs in ("decoder.weight", "W_enc")  # than it lies in our memory
        tensor = copied(state.pop(theirs), is_other_way)
        ours[name] = tensor.T if name == "W_enc" else tensor
    if norm_factor is not None:
        for name in ours.keys() & {*SCALED_WITH_ACTIVATIONS}:
            ours[name] *= norm_factor
    if counts_norms:
        multiply_by_norms(ours)
    if "log_threshold" in ours:
        ours["log_threshold"] = folding.log_thresholds(ours["log_threshold"])
    if normaliser is not None:
        folding.fold_normaliser(ours, normaliser.mean, normaliser.scale, LEAST)
    return ours


def multiply_by_norms(ours: dict[str, Tensor]) -> None:
    """Activations times the norms of decoder rows, as forks report them of gated and jumprelu; the output stays."""
    norms = ours["W_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    ours["W_dec"] /= norms.unsqueeze(1)
    if "r_mag" in ours:
        ours["r_mag"] += norms.log()
        ours["b_mag"] *= norms
        return
    for name in ("W_enc", "b_enc", "log_threshold"):  # which are thresholds still
        ours[name] *= norms


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
            if is_beside and file.name == OF_FORKS:  # arguments of the class
                return {}, config, ()
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
