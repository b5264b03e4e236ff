"""Crosscoders between models: those of science-of-finetuning's dictionary_learning, and those of Kissane et al.

| program             | files                                  | W_enc, W_dec                                          |
|---------------------|----------------------------------------|-------------------------------------------------------|
| dictionary_learning | model.safetensors or .pt, config.json  | encoder.weight (L, d, n), decoder.weight (L, n, d)    |
| Kissane             | cc_weights.pt, cfg.json                | W_enc (models, d, n), W_dec (n, models, d)            |

Both are relu(sum of x_l W_enc[l] + b), and nothing is subtracted. BatchTopKCrossCoder also has a threshold, which it
compares with the activation times the norms of decoder rows: their sum over places (code_normalization CROSSCODER), the
norm over all places (SAE), a mixture of these (MIXED), 1 (NONE), or each place's own, which decides for that place
(DECOUPLED). Its normaliser of activations (mean and scale of each place) becomes part of the weights.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.json_files import read_object
from sae_training.formats.loaded import Given, Loaded, precisions
from sae_training.formats.normaliser import LEAST, MEAN, NAMES, Normaliser, check_normaliser, normaliser_in
from sae_training.formats.pickles import copied, tensors_by_name
from sae_training.formats.several_places import (
    CROSSCODER,
    Tensors,
    all_to_all,
    all_to_each,
    check_shapes,
    check_sizes,
    decoder_norms,
    loaded_crosscoder,
    numbered,
    thresholds,
)

TRAINED, CONFIG = "ae.pt", "config.json"
FILES = ("model.safetensors", "cc_weights.pt", TRAINED)
BESIDE = ("code_normalization_id", "k", "threshold", *NAMES)
COMPILED = "_orig_mod."
NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""By code_normalization_id, which begins at 1."""

ALPHAS = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}
"""The parts of MIXED, and their defaults there."""


def recognises(found: Found) -> bool:
    file = file_of(found)
    if file is None:
        return False
    shapes = shapes_in(found, file)
    return any(len(shapes.get(name, ())) == 3 for name in ("encoder.weight", "W_enc"))


def file_of(found: Found) -> str | None:
    if found.is_folder:
        return next(
            (name for name in FILES if name in found.names and (name != TRAINED or is_of_crosscoder(found))), None
        )
    return found.path.name if found.is_pickle or found.path.suffix == ".safetensors" else None


def is_of_crosscoder(found: Found) -> bool:
    """Whether config.json says that ae.pt, the name of all that dictionary_learning trains, is a crosscoder."""
    with suppress(ValueError, OSError):
        trainer = found.json(CONFIG).get("trainer") if CONFIG in found.names else None
        return isinstance(trainer, dict) and "CrossCoder" in str(trainer.get("dict_class"))
    return False


def shapes_in(found: Found, file: str) -> dict[str, tuple[int, ...]]:
    """Shapes by their names in dictionary_learning, without what torch.compile puts before them."""
    if file.endswith(".safetensors"):
        shapes = found.header(file).shapes
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(found.pickle(file), depth=1).items()}
    return {name.removeprefix(COMPILED): shape for name, shape in shapes.items()}


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The crosscoder of a folder or file. ValueError for what is missing, unknown or of another shape."""
    file = file_of(found) or FILES[0]
    path, shapes = found.folder / file, shapes_in(found, file)
    one = read_fork if "encoder.weight" in shapes else read_kissane
    name = path.parent.absolute().name if file in FILES else path.stem
    return {name: one(found, path, shapes, given)}


def dtype_in(found: Found, file: str, name: str) -> str:
    if file.endswith(".safetensors"):
        dtypes = found.header(file).dtypes
        return dtypes.get(name) or dtypes[COMPILED + name]
    state = found.pickle(file)
    return str(state.get(name, state.get(COMPILED + name)).dtype).removeprefix("torch.")


def state_in(found: Found, file: str) -> Tensors:
    """The tensors in memory of their own, in float32 at least."""
    if file.endswith(".safetensors"):
        state = found.tensors(file)
    else:
        state = {name: copied(tensor) for name, tensor in tensors_by_name(found.pickle(file), depth=1).items()}
    return {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}


def config_beside(path: Path, *names: str) -> dict[str, Any]:
    return next((read_object(path.with_name(name)) for name in names if path.with_name(name).is_file()), {})


# -------------------------------------------------------------------------------------------------------------- Kissane


def read_kissane(found: Found, path: Path, shapes: dict[str, tuple[int, ...]], given: Given) -> Loaded:
    n, d, d_sae = shapes["W_enc"]
    check_sizes(path, n, d, d_sae)
    check_shapes(path, shapes, {"W_enc": (n, d, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, n, d), "b_dec": (n, d)})
    config = config_beside(path, f"{path.stem}_cfg.json", "cfg.json")
    hook_point = config.get("hook_point")
    names = tuple(f"{i}:{hook_point}" for i in range(n)) if isinstance(hook_point, str) else numbered(n)
    values = common(found, path.name, "W_dec", names, names, d, d_sae) | {
        "latents": all_to_all(n, n),
        "activation": "relu",
        "file_format": "kissane crosscoder",
        "model_name": config.get("model_name") if isinstance(config.get("model_name"), str) else None,
    }
    remark = (
        "training scaled each model's rows by a factor that the files do not hold: give rows in these units, or "
        "norm_factors= (that program's own analysis of the Gemma crosscoder has 0.2758961493232058 for the base model, "
        "0.24422852496546169 for the chat model)"
    )
    return loaded_crosscoder(given, values, partial(kissane_weights, found, path.name), (remark,))


def kissane_weights(found: Found, file: str) -> Tensors:
    state = state_in(found, file)
    made = {f"W_enc.0.{j}": W for j, W in enumerate(state["W_enc"])}
    made |= {f"W_dec.0.{j}": W for j, W in enumerate(state["W_dec"].unbind(1))}
    return made | {"b_enc": state["b_enc"].unsqueeze(0), "b_dec": state["b_dec"]}


def common(
    found: Found, file: str, name: str, reads: tuple[str, ...], writes: tuple[str, ...], d: int, d_sae: int
) -> dict[str, Any]:
    return {
        "architecture": CROSSCODER,
        "reads": reads,
        "writes": writes,
        "d_in": d,
        "d_out": d,
        "d_sae": d_sae,
        "file_dtype": precisions(dtype_in(found, file, name))["file_dtype"],
    }


# -------------------------------------------------------------------------------------------------- dictionary_learning


def read_fork(found: Found, path: Path, shapes: dict[str, tuple[int, ...]], given: Given) -> Loaded:
    config = config_beside(path, CONFIG)
    trainer = config["trainer"] if isinstance(config.get("trainer"), dict) else {}
    config = trainer | config
    n_read, d, d_sae = shapes["encoder.weight"]
    n = shapes.get("decoder.bias", (n_read,))[0]
    kept = {name: shape for name, shape in shapes.items() if name not in BESIDE}
    expected = {"encoder.weight": (n_read, d, d_sae), "encoder.bias": (d_sae,)}
    check_shapes(path, kept, expected | {"decoder.weight": (n, d_sae, d), "decoder.bias": (n, d)})
    normalization = normalization_of(found, path, shapes, config)
    is_decoupled = normalization == "DECOUPLED" and "threshold" in shapes
    layers = next((config[key] for key in ("encoder_layers", "encoder_layers_indices") if config.get(key)), None)
    chosen = tuple(map(int, layers)) if layers else tuple(range(n_read))
    check_sizes(path, max(n, *chosen, n_read), d, d_sae)
    names = numbered(max(n, *(place + 1 for place in chosen)))
    sets = all_to_each(len(chosen), n) if is_decoupled else all_to_all(len(chosen), n)
    model_name = config.get("lm_name")
    values = common(found, path.name, "decoder.weight", names, numbered(n), d, d_sae) | {
        "latents": tuple((tuple(chosen[j] for j in reads), writes) for reads, writes in sets),
        "activation": "batchtopk" if "threshold" in shapes else "relu",
        "k": config.get("k") if isinstance(config.get("k"), int) else None,
        "shares_encoder": is_decoupled,
        "file_format": f"crosscoder_learning {'BatchTopK' if 'threshold' in shapes else ''}CrossCoder",
        "model_name": model_name if isinstance(model_name, str) else None,
    }
    normaliser = normaliser_of(found, path, shapes, (len(names), d), is_decoupled)
    alphas = [float(config.get(key, usual)) for key, usual in ALPHAS.items()]
    read_weights = partial(fork_weights, found, path.name, values, normalization, alphas, normaliser)
    convention = "activations are those that decode takes; get_activations there multiplies them by decoder norms"
    return loaded_crosscoder(
        given, values, read_weights, normaliser.remarks if normaliser else (), convention=convention
    )


def normaliser_of(
    found: Found, path: Path, shapes: dict[str, tuple[int, ...]], shape: tuple[int, ...], is_decoupled: bool
) -> Normaliser | None:
    """ValueError for one that is incomplete, and for that of a decoupled crosscoder, which normalises twice."""
    check_normaliser(shapes, shape)
    normaliser = normaliser_in({n: small_tensor(found, path.name, n) for n in NAMES if n in shapes}, shape)
    if normaliser and is_decoupled:
        raise ValueError(f"{path}: {MEAN}: of a DECOUPLED crosscoder, whose program normalises its input twice.")
    return normaliser


def normalization_of(found: Found, path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> str:
    """code_normalization by name: of config.json, or by the id in the file; files of before it had CROSSCODER."""
    stated = config.get("code_normalization")
    if stated is None and "code_normalization_id" in shapes:
        number = int(small_tensor(found, path.name, "code_normalization_id"))
        stated = NORMALIZATIONS[number - 1] if 1 <= number <= len(NORMALIZATIONS) else number
    stated = "CROSSCODER" if stated is None else str(stated).upper()
    if stated not in NORMALIZATIONS:
        raise ValueError(f"{path}: code_normalization is {stated}, expected one of {', '.join(NORMALIZATIONS)}.")
    return stated


def small_tensor(found: Found, file: str, name: str) -> Tensor:
    """A scalar or a short tensor of the file, without reading the others."""
    if not file.endswith(".safetensors"):
        state = found.pickle(file)
        return copied(state[name] if name in state else state[COMPILED + name])
    name = name if name in found.header(file).shapes else COMPILED + name
    return next(part for _, part in found.slices(file, name))


def fork_weights(
    found: Found,
    file: str,
    values: dict[str, Any],
    normalization: str,
    alphas: list[float],
    normaliser: Normaliser | None,
) -> Tensors:
    state = state_in(found, file)
    made = {f"W_enc.0.{j}": W for j, W in enumerate(state["encoder.weight"])}
    is_decoupled = values["shares_encoder"]
    for j, W in enumerate(state["decoder.weight"]):
        made[f"W_dec.{j}.0" if is_decoupled else f"W_dec.0.{j}"] = W
    made |= {"b_enc": state["encoder.bias"].unsqueeze(0), "b_dec": state["decoder.bias"]}
    if "threshold" in state:
        threshold = state["threshold"].reshape(-1, 1)
        made["threshold"] = thresholds(threshold, norms_of_code(made, values, normalization, alphas))
    if normaliser is not None:
        fold_normaliser(made, normaliser, values)
    return made


def norms_of_code(made: Tensors, values: dict[str, Any], normalization: str, alphas: list[float]) -> Tensor:
    """What activations are multiplied with before they are compared: (1, n), or (places, n) if decoupled."""
    if normalization == "DECOUPLED":
        return decoder_norms(made, len(values["latents"]))
    over_all = decoder_norms(made, 1)
    summed = torch.stack([W.norm(dim=1) for name, W in made.items() if name.startswith("W_dec.")]).sum(dim=0)[None]
    match normalization:
        case "CROSSCODER":
            return summed
        case "SAE":
            return over_all
        case "MIXED":
            return over_all * alphas[0] + summed * alphas[1]
        case _:
            return torch.ones_like(summed)


@torch.no_grad()
def fold_normaliser(made: Tensors, normaliser: Normaliser, values: dict[str, Any]) -> None:
    """Make (x - mean) * scale of inputs, and out / (scale + 1e-8) + mean of outputs, part of the weights."""
    mean, scale = normaliser.mean.to(made["b_dec"]), normaliser.scale.to(made["b_dec"])
    (reads, writes), *_ = values["latents"]
    for j, place in enumerate(reads):
        W = made[f"W_enc.0.{j}"].mul_(scale[place])
        made["b_enc"][0].sub_(mean[place] @ W)
    for j, place in enumerate(writes):
        factor = scale[place] + LEAST
        made[f"W_dec.0.{j}"].div_(factor)
        made["b_dec"][place].div_(factor).add_(mean[place])
