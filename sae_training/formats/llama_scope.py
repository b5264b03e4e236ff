"""Dictionaries of OpenMOSS: Llama Scope of 2024, those of 2025 (Llama Scope R1), and llamascopium 2.

| written | files                                      | which latents are active, and their activations              |
|---------|--------------------------------------------|--------------------------------------------------------------|
| 2024    | hyperparams.json, checkpoints/final.*      | p * w > the threshold, in the model's own units: p * w       |
| 2025    | config.json, sae_weights.*: encoder.weight | p * w > exp(log_jumprelu_threshold): p, in scaled units      |
| 2       | config.json, sae_weights.*: W_E, W_D       | the same; or the k with the largest p * w: p                 |

w is the norm of the latent's decoder row, or 1 without `sparsity_include_decoder_norm`. These programs normalise rows
before encode, and bring reconstructions back after decode: by sqrt(d_in) over the mean norm of a data set
(`dataset-wise`: the mean norm is in the file, and the factor is folded), or over each row's own norm (`token-wise`).
`inference` says that nothing is left to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.formats import folding, json_files
from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of, transformer_lens_name
from sae_training.formats.loaded import Given, Loaded, needed, place_and_text, precisions, sizes
from sae_training.formats.pickles import copied, tensors_by_name
from sae_training.machine.precision import at_least_float32

CONFIG, CONFIG_OF_2024, MODEL_OF_2024 = "config.json", "hyperparams.json", "lm_config.json"
BELOW = "checkpoints"
WEIGHTS = tuple(
    f"{name}{ending}"
    for name in ("sae_weights", f"{BELOW}/pruned", f"{BELOW}/final")
    for ending in (".safetensors", ".pt")
)
"""Files of weights of a folder; the programs take the first."""
IN_SHARDS = "sae_weights.dcp"

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
MATRICES = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
LOG_THRESHOLD = "log_jumprelu_threshold"  # in 2 after activation_function.
NORM = "dataset_average_activation_norm"
GLU = ("W_E_glu", "b_E_glu", "encoder_glu.weight", "encoder_glu.bias")

OTHER_KINDS = ("crosscoder", "clt", "lorsa", "molt")

PLAUSIBLE = (1e-8, 1e8)
"""Where a norm factor lies. A file without a norm holds whatever was in memory (torch.empty) in its place."""


@dataclass(frozen=True)
class Plan:
    """What the files say of how their tensors are used."""

    written: str
    """2024, 2025 or 2."""
    activation: str
    counts_norms: bool
    """sparsity_include_decoder_norm."""
    factors: tuple[float, float] | None
    """Of inputs and of targets, to be folded."""
    threshold: float
    """2024: the same for all latents."""
    subtracts_b_dec: bool
    is_transcoder: bool


# ---------------------------------------------------------------------------------------------------------- which files


def recognises(found: Found) -> bool:
    where = config_file(found)
    if where is None or weights_file(found) is None:
        return False
    config = config_at(found, where)
    kind = config.get("sae_type", "sae")
    return kind not in OTHER_KINDS and (kind == "sae" and "sae_type" in config or "hook_point_in" in config)


def config_file(found: Found) -> Path | None:
    """The config in the folder or beside the file; of a file in checkpoints/ the one above."""
    folders = [found.folder]
    if not found.is_folder and found.folder.name == BELOW:
        folders.append(found.folder.parent)
    return next((f / n for f in folders for n in (CONFIG, CONFIG_OF_2024) if (f / n).is_file()), None)


def config_at(found: Found, where: Path) -> dict[str, Any]:
    return found.json(where.name) if where.parent == found.folder else json_files.read_object(where)


def weights_file(found: Found) -> str | None:
    """The file of weights, as a path from the folder; IN_SHARDS for a folder of shards, which is not read."""
    if not found.is_folder:
        return found.path.name if found.path.name.endswith((".safetensors", ".pt")) else None
    there = (name for name in WEIGHTS if name in found.names or ("/" in name and (found.folder / name).is_file()))
    return next(there, IN_SHARDS if (found.folder / IN_SHARDS).is_dir() else None)


def shapes_of(found: Found, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and precision of each tensor, by name."""
    if file.endswith(".safetensors"):
        head = found.header(file)
        return {name: (shape, head.dtypes[name]) for name, shape in head.shapes.items()}
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in pickled(found, file).items()}


def pickled(found: Found, file: str) -> dict[str, Tensor]:
    content = found.pickle(file)
    return tensors_by_name(content["sae"] if isinstance(content, dict) and "sae" in content else content)


def tensors_at(found: Found, file: str) -> dict[str, Tensor]:
    if not file.endswith(".safetensors"):
        return {name: copied(tensor) for name, tensor in pickled(found, file).items()}
    return {name: tensor.to(at_least_float32(tensor.dtype)) for name, tensor in found.tensors(file).items()}


# --------------------------------------------------------------------------------------------------------------- config


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The dictionary of the folder or file. ValueError for what is missing, and for what is no function of one row."""
    where, file = config_file(found), weights_file(found)
    assert where is not None and file is not None, "recognises() was true"
    if file == IN_SHARDS:
        raise ValueError(
            f"{found.folder / file}: a checkpoint in shards (torch.distributed.checkpoint), which is not read; load it "
            "with llamascopium and save it as sae_weights.safetensors."
        )
    config, parts = config_at(found, where), shapes_of(found, file)
    if config.get("sae_type", "sae") != "sae":
        raise ValueError(f"{where}: sae_type: found {config['sae_type']!r}, expected sae; others are not read.")
    written = "2" if "W_E" in parts else "2024" if where.name == CONFIG_OF_2024 else "2025"
    path = found.folder / file
    check_tensors(path, written, config, parts)
    (d_sae, d_in), d_out = matrix(parts, "W_enc"), matrix(parts, "W_dec")[1]
    plan = plan_of(found, file, where, config, written, d_in, given)
    dtype = next(dtype for name, (_, dtype) in parts.items() if name in ("W_D", "decoder.weight"))
    values = (
        sizes(d_in, d_sae)
        | place(where, config, given)
        | {
            "architecture": architecture_of(plan),
            "apply_b_dec_to_input": plan.subtracts_b_dec or plan.is_transcoder,
            "model_processing": "none",
            "file_format": f"llama_scope {written}" if written != "2" else "llamascopium 2",
            **precisions(dtype),
        }
    )
    if plan.activation == "topk":
        values["k"] = needed(given.k, config.get("top_k", 50), "top_k", "k", where)
    if config.get("norm_activation", default_norm(written)) == "token-wise":
        values["normalize_activations"] = "constant_norm_rescale"
    if plan.is_transcoder:
        values |= {"target_hook_point": transformer_lens_name(config["hook_point_out"]), "d_out": d_out}
    made, is_given = partial(weights, found, file, plan), given.norm_factor is not None
    told = remarks(where, config, plan, given)
    one = Loaded(values, made, told, convention(plan, values), takes_norm_factor=is_given)
    return {where.parent.absolute().name: one}


def default_norm(written: str) -> str:
    return "token-wise" if written == "2024" else "dataset-wise"


def plan_of(
    found: Found, file: str, where: Path, config: dict[str, Any], written: str, d_in: int, given: Given
) -> Plan:
    """ValueError for activations and normalisations that depend on other rows, and for gated encoders."""
    activation = str(config.get("act_fn", "relu")).lower()
    threshold = float(config.get("jump_relu_threshold", 0.0))
    if activation == "batchtopk":
        raise ValueError(
            f"{where}: act_fn is batchtopk, whose active latents depend on the other rows of a batch, also after "
            "training: the files hold no threshold; convert it to jumprelu where it was trained."
        )
    if activation not in ("relu", "topk", "jumprelu") or (activation, written) == ("topk", "2025"):
        raise ValueError(f"{where}: act_fn: found {activation!r}, expected relu or jumprelu (or topk, but for 2025).")
    if activation == "jumprelu" and threshold < 0:
        raise ValueError(f"{where}: jump_relu_threshold: found {threshold}, expected 0 or more.")
    hooks = config.get("hook_point_in"), config.get("hook_point_out")
    by_default = written == "2024" and bool(config.get("use_decoder_bias", True))
    return Plan(
        written,
        activation,
        bool(config.get("sparsity_include_decoder_norm", True)),
        factors_of(found, file, where, config, written, d_in, given),
        threshold,
        written != "2" and bool(config.get("apply_decoder_bias_to_pre_encoder", by_default)),
        hooks[1] not in (None, hooks[0]),
    )


def architecture_of(plan: Plan) -> str:
    if plan.activation == "topk" and plan.written == "2" and plan.counts_norms:
        return "normtopk"
    return {"relu": "standard"}.get(plan.activation, plan.activation)


def factors_of(
    found: Found, file: str, where: Path, config: dict[str, Any], written: str, d_in: int, given: Given
) -> tuple[float, float] | None:
    """What inputs and targets are multiplied by, sqrt(d_in) over their mean norms; None: by nothing, or row by row."""
    mode = config.get("norm_activation", default_norm(written))
    if mode == "batch-wise":
        raise ValueError(
            f"{where}: norm_activation is batch-wise: rows are divided by the mean norm of their batch, so that "
            "activations depend on the other rows of it; such a dictionary is no function of one row."
        )
    if mode not in ("dataset-wise", "token-wise", "inference", "none"):
        raise ValueError(f"{where}: norm_activation: found {mode!r}, expected dataset-wise, token-wise or inference.")
    hooks = config.get("hook_point_in"), config.get("hook_point_out") or config.get("hook_point_in")
    if mode != "dataset-wise":
        if given.norm_factor is not None:
            raise ValueError(f"norm_factor: given, with norm_activation {mode} in {where}, which needs none.")
        return None
    if given.norm_factor is not None:
        if hooks[0] != hooks[1] and given.norm_factor != 1:
            raise ValueError(f"{where}: norm_factor: inputs and targets of a transcoder have one each; give 1 or none.")
        return given.norm_factor, given.norm_factor
    norms = norms_in_file(found, file, config, written, (str(hooks[0]), str(hooks[1])))
    made = [math.sqrt(d_in) / norm if norm else math.inf for norm in norms]
    wrong = [norm for norm, factor in zip(norms, made, strict=True) if not PLAUSIBLE[0] < factor < PLAUSIBLE[1]]
    if not made or wrong:
        raise ValueError(
            f"{where}: norm_activation is dataset-wise, and {NORM} is {f'{wrong[0]:.3g}' if wrong else 'missing'}, "
            "expected the mean norm of activations; give norm_factor=sqrt(d_in) / that norm."
        )
    return made[0], made[-1]


def norms_in_file(found: Found, file: str, config: dict[str, Any], written: str, hooks: tuple[str, str]) -> list[float]:
    """The mean norms of inputs and of targets, as far as they are there."""
    if written == "2024":
        norms = config.get(NORM) or {}
        return [float(norms[side]) for side in ("in", "out") if side in norms]
    names = [f"{NORM}.{hook}" for hook in hooks]
    if file.endswith(".safetensors"):
        there = [name for name in names if name in found.header(file).shapes]
        return [next(part for _, part in found.slices(file, name)).item() for name in there]
    state = pickled(found, file)
    return [state[name].item() for name in names if name in state]


def check_tensors(
    path: Path, written: str, config: dict[str, Any], parts: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """ValueError unless the file holds the tensors of its config, and no others that would be left out."""
    if config.get("use_glu_encoder") or any(name in parts for name in GLU):
        raise ValueError(
            f"{path}: its encoder is gated (use_glu_encoder: the pre-activations times a sigmoid of another product), "
            "which no architecture here has; it is not read."
        )
    names = MATRICES if written == "2" else LINEAR
    threshold = f"activation_function.{LOG_THRESHOLD}" if written == "2" else LOG_THRESHOLD
    wanted = {name for name, ours in names.items() if ours != "b_dec" or config.get("use_decoder_bias", True)}
    if str(config.get("act_fn")).lower() == "jumprelu" and written != "2024":
        wanted.add(threshold)
    present = {name for name in parts if not name.startswith(NORM)}
    if wanted != present:
        raise ValueError(
            f"{path}: found {', '.join(sorted(present))}, expected {', '.join(sorted(wanted))}, as its config has it; "
            "use another copy."
        )
    shapes = {ours: matrix(parts, ours) for ours in ("W_enc", "W_dec")}
    b_enc = next(parts[name][0] for name, ours in names.items() if ours == "b_enc")
    if shapes["W_enc"][0] != shapes["W_dec"][0] or b_enc != (shapes["W_enc"][0],):
        raise ValueError(f"{path}: latents by {', '.join(f'{n} {s}' for n, s in shapes.items())} and b_enc {b_enc}.")


def matrix(parts: dict[str, tuple[tuple[int, ...], str]], ours: str) -> tuple[int, int]:
    """Shape of a matrix with latents as rows: (d_sae, d_in) or (d_sae, d_out)."""
    has_latents_first = {"encoder.weight": True, "W_D": True, "W_E": False, "decoder.weight": False}
    names = [name for name, name_here in (LINEAR | MATRICES).items() if name_here == ours and name in parts]
    shape = parts[names[0]][0]
    if len(shape) != 2:
        raise ValueError(f"{names[0]}: found shape {shape}, expected two axes.")
    return shape if has_latents_first[names[0]] else (shape[1], shape[0])


def place(where: Path, config: dict[str, Any], given: Given) -> dict[str, Any]:
    """The place by the config, and the model by lm_config.json, if it is there."""
    hook_point = config.get("hook_point_in")
    hook_point = transformer_lens_name(hook_point) if isinstance(hook_point, str) else None
    about_model = where.parent / MODEL_OF_2024
    model = json_files.read_object(about_model).get("model_name") if about_model.is_file() else None
    return place_and_text(given, model, hook_point, layer_of(hook_point or ""))


def remarks(where: Path, config: dict[str, Any], plan: Plan, given: Given) -> tuple[str, ...]:
    told = []
    if plan.written == "2" and plan.factors is not None and given.norm_factor is None:
        told.extend(remarks_of_folding(where, "train_sae"))
    if plan.activation == "topk" and plan.threshold > 0:
        told.append(
            f"act_fn is topk with jump_relu_threshold {plan.threshold}: OpenMOSS's loader says that it converts such a "
            "file to jumprelu, and goes on to choose the k largest, as here; change act_fn to jumprelu for the other"
        )
    if plan.is_transcoder and config.get("norm_activation", default_norm(plan.written)) == "token-wise":
        told.append("the transcoder's output is in the units of targets of norm sqrt(d_out), and not brought back")
    return tuple(told)


def remarks_of_folding(where: Path, trained_by: str) -> tuple[str, ...]:
    """For files of norm_activation dataset-wise that llamascopium wrote; none of a checkpoint's."""
    if where.parent.parent.name == BELOW:
        return ()
    return (
        f"norm_activation is dataset-wise, and weights are read as such; but llamascopium's {trained_by} writes "
        f"{CONFIG} before it folds the norm into the weights that it saves (fold_activation_scale, its default): "
        "if they come from it, give norm_factor=1",
    )


def convention(plan: Plan, values: dict[str, Any]) -> str:
    if plan.written == "2024":
        times = "times the norms of the file's decoder rows, " if plan.counts_norms else ""
        return f"activations are {times}in the model's own units, as OpenMOSS's loader of 2024 has them"
    if plan.factors not in (None, (1, 1)) or values.get("normalize_activations"):
        return "activations are in the units of normalised rows, without the norms of decoder rows, as encode has them"
    return Loaded.convention


# -------------------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def weights(found: Found, file: str, plan: Plan) -> dict[str, Tensor]:
    theirs = tensors_at(found, file)
    names = MATRICES if plan.written == "2" else LINEAR
    made = {ours: theirs[name] for name, ours in names.items() if name in theirs}
    log_threshold = next((tensor for name, tensor in theirs.items() if name.endswith(LOG_THRESHOLD)), None)
    del theirs
    if plan.written != "2":
        made["W_enc"], made["W_dec"] = made["W_enc"].T, made["W_dec"].T.contiguous()
    made["W_enc"] = folding.latent_by_latent(made["W_enc"])
    made.setdefault("b_dec", made["W_dec"].new_zeros(made["W_dec"].shape[1]))
    if log_threshold is not None:
        norms = made["W_dec"].norm(dim=1) if plan.counts_norms else torch.ones_like(log_threshold)
        made["log_threshold"] = folding.log_thresholds(log_threshold.exp() / norms)
    if plan.is_transcoder and plan.subtracts_b_dec and plan.written == "2025":
        folding.fold_subtraction(made)
    factor_in, factor_out = plan.factors or (1.0, 1.0)
    folding.fold_norm_factor(made, factor_in, factor_out)
    if plan.written == "2024":
        in_own_units(made, plan, factor_in)
    return made


def in_own_units(made: dict[str, Tensor], plan: Plan, factor_in: float) -> None:
    """Activations as OpenMOSS's loader of 2024 has them, which makes decoder rows of norm 1, or divides by the factor.

    Its one threshold is for these, though training had none, or had it in other units.
    """
    if plan.is_transcoder and plan.subtracts_b_dec:
        folding.fold_subtraction(made)
    if plan.counts_norms:
        folding.fold_decoder_norms(made)
    else:
        folding.scale_activations(made, 1 / factor_in)
    if plan.activation == "jumprelu":
        made["log_threshold"] = folding.log_thresholds(torch.full_like(made["b_enc"], plan.threshold))
