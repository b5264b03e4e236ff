"""Files of SAELens 3 to 6: a folder with cfg.json and sae_weights.safetensors.

Its results and its checkpoints. A checkpoint may have beside it the factor or the whitening that training gave
activations (activation_scaler.json, activation_whitening.safetensors), in which its weights are; they are folded.

| theirs                                  | here                                                                     |
|-----------------------------------------|--------------------------------------------------------------------------|
| rescale_acts_by_decoder_norm            | folded: acts as they report them, W_dec with rows of unit norm           |
| scaling_factor (of decode alone)        | folded into W_dec                                                        |
| threshold, log_threshold, topk_threshold| log_threshold; batchtopk's inference_threshold                           |
| b_gate, b_mag, r_mag                    | b_enc, b_mag, r_mag                                                      |
| W_skip (d_out, d_in)                    | W_skip (d_in, d_out)                                                     |
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_training.formats import folding
from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, factor_in, needed, precisions, sizes
from sae_training.formats.releases import facts_of
from sae_training.formats.saelens_config import (
    TRANSCODERS,
    config_values,
    in_one_vocabulary,
    transformer_lens_name,
    version_of,
)
from sae_training.machine.precision import at_least_float32

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"

ENCODERS: dict[str, tuple[str, ...]] = {
    "gated": ("b_gate", "b_mag", "r_mag", "W_enc"),
    "jumprelu": ("b_enc", "threshold", "W_enc"),
    "jumprelu_transcoder": ("b_enc", "threshold", "W_enc"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_enc", "W_skip"),
    "skip_transcoder": ("b_enc", "W_enc", "W_skip"),
    "batchtopk": ("b_enc", "topk_threshold", "W_enc"),
    "matryoshka_batchtopk": ("b_enc", "topk_threshold", "W_enc"),
    "matching_pursuit": (),
}
"""The tensors of an architecture beside W_dec and b_dec; the others have b_enc and W_enc."""

SCALING_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
WITH_NORMS = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
"""Architectures that may have rescale_acts_by_decoder_norm. In training, its default is True."""


def recognises(found: Found) -> bool:
    return found.has(CONFIG, WEIGHTS)


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The autoencoder of the folder. ValueError for what is missing or not read, with the reason."""
    where = found.folder / CONFIG
    cfg = in_one_vocabulary(found.json(CONFIG), str(where))
    header = found.header(WEIGHTS)
    check_tensors(cfg, header.shapes, found)
    d_sae, d_out = header.shapes["W_dec"]
    d_in = header.shapes["W_enc"][0] if "W_enc" in header.shapes else d_out
    stated = cfg.get("d_in", d_in), cfg.get("d_sae", d_sae)
    if stated != (d_in, d_sae):
        raise ValueError(f"{where}: d_in, d_sae: found {stated}, expected {(d_in, d_sae)} as in {WEIGHTS}; correct it.")
    values = config_values(cfg, given) | sizes(d_in, d_sae)
    values["file_format"] = f"saelens {version_of(cfg) or cfg['metadata']['major_version']}"
    values |= precisions(header.dtypes["W_dec"])
    if cfg["architecture"] in WITH_NORMS:
        values["k"] = max(1, round(needed(given.k, cfg.get("k"), "k", "k", where)))
    if cfg["architecture"] in TRANSCODERS:
        about = cfg["metadata"]
        model_name = given.model_name or about.get("model_name")
        target = transformer_lens_name(about.get("hook_name_out") or "", model_name) or "unknown"
        values |= {"target_hook_point": target, "d_out": d_out, "skip_connection": "W_skip" in header.shapes}
        values["apply_b_dec_to_input"] = True  # of autoencoders only: nothing is subtracted here
    factor = norm_factor(found, cfg, given)
    made, is_given = partial(weights, found, cfg, factor), given.norm_factor is not None
    one = Loaded(values, made, remarks(cfg, factor), convention(cfg), takes_norm_factor=is_given)
    return {found.folder.absolute().name: one}


def check_tensors(cfg: dict[str, Any], shapes: dict[str, tuple[int, ...]], found: Found) -> None:
    """ValueError unless the file holds the tensors of its architecture, and no others that would be left out."""
    names = {"b_dec", "W_dec", *ENCODERS.get(cfg["architecture"], ("b_enc", "W_enc"))}
    if "log_threshold" in shapes:
        names = {name.replace("threshold", "log_threshold") if name == "threshold" else name for name in names}
    present = {name for name in shapes if name not in SCALING_FACTORS}
    lines = [f"{name}: missing" for name in sorted(names - present)]
    lines += [f"{name}: not a tensor of architecture {cfg['architecture']}" for name in sorted(present - names)]
    lines += [
        f"{name}: found shape {shapes[name]}, expected two axes"
        for name in names & {"W_enc", "W_dec", "W_skip"}
        if name in shapes and len(shapes[name]) != 2
    ]
    if lines:
        raise ValueError(f"{found.folder / WEIGHTS}: does not fit {CONFIG}:\n" + "\n".join(lines))


def norm_factor(found: Found, cfg: dict[str, Any], given: Given) -> float | None:
    """The factor by which training multiplied activations; None: it did not, or nobody says."""
    in_file = found.json(SCALER).get("scaling_factor") if SCALER in found.names else None
    in_file = None if in_file is None else factor_in(in_file, f"{found.folder / SCALER}: scaling_factor")
    if cfg["architecture"] == "matching_pursuit" and (in_file or given.norm_factor) is not None:
        raise ValueError(f"{found.folder}: a factor of activations cannot be folded into matching_pursuit's decoder.")
    is_scaled = cfg["normalize_activations"] == "expected_average_only_in"
    if given.norm_factor is None and in_file is None and is_scaled:
        return facts_of(found.folder, "saelens").get("norm_factor")
    if given.norm_factor is None:
        return in_file
    if not is_scaled and in_file is None:
        raise ValueError(
            f"norm_factor: found {given.norm_factor} with normalize_activations {cfg['normalize_activations']!r} in "
            f"{found.folder / CONFIG}, which needs none; leave it out."
        )
    return given.norm_factor


def remarks(cfg: dict[str, Any], factor: float | None) -> tuple[str, ...]:
    found = []
    if cfg["normalize_activations"] == "expected_average_only_in" and factor is None:
        found.append(
            "normalize_activations is expected_average_only_in without a factor, as in files whose weights have it; if "
            "the weights were trained on scaled activations and not folded, give norm_factor=..."
        )
    if cfg.get("reshape_activations") == "hook_z" and cfg["metadata"].get("hook_name") is None:
        found.append(
            "reshape_activations is hook_z without a hook_name: give hook_point=..., or rows with heads side by side"
        )
    if cfg["architecture"] in TRANSCODERS and cfg["normalize_activations"] in ("layer_norm", "constant_norm_rescale"):
        found.append("the transcoder's input is normalised row by row, and its output is not brought back to any size")
    return tuple(found)


def convention(cfg: dict[str, Any]) -> str:
    if has_norms(cfg):
        return "activations are pre-activations times the norms of the file's decoder rows, as SAELens reports them"
    if cfg["normalize_activations"] != "none":
        return f"activations are in the units of normalised rows ({cfg['normalize_activations']})"
    return Loaded.convention


def has_norms(cfg: dict[str, Any]) -> bool:
    in_training = cfg["architecture"] in ("batchtopk", "matryoshka_batchtopk")
    return cfg["architecture"] in WITH_NORMS and bool(cfg.get("rescale_acts_by_decoder_norm", in_training))


# ------------------------------------------------------------------------------------------------------------- weights


def weights(found: Found, cfg: dict[str, Any], factor: float | None) -> dict[str, Tensor]:
    theirs = {name: tensor.to(at_least_float32(tensor.dtype)) for name, tensor in found.tensors(WEIGHTS).items()}
    ours = renamed(theirs, cfg)
    for name in SCALING_FACTORS:
        if name in theirs and not torch.all(theirs[name] == 1):
            if not cfg.get("finetuning_scaling_factor"):
                raise ValueError(
                    f"{found.folder / WEIGHTS}: {name} holds factors, but finetuning_scaling_factor of {CONFIG} is "
                    "not True; correct one of them."
                )
            folding.scale_decoder(ours, theirs[name])
    if has_norms(cfg):
        folding.fold_decoder_norms(ours)
    fold_whitening(found, cfg, ours)
    if factor is not None:
        folding.fold_norm_factor(ours, factor)
    return ours


def renamed(theirs: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    """Their tensors under our names."""
    ours = {name: theirs[name] for name in ("W_dec", "b_dec", "b_mag", "r_mag") if name in theirs}
    if cfg["architecture"] == "matching_pursuit":
        ours |= {"W_enc": theirs["W_dec"].clone().T, "b_enc": theirs["W_dec"].new_zeros(len(theirs["W_dec"]))}
        if not cfg.get("apply_b_dec_to_input", True):  # it is then added to no output either
            ours["b_dec"] = torch.zeros_like(theirs["b_dec"])
        return ours
    ours["W_enc"] = folding.latent_by_latent(theirs.pop("W_enc"))
    ours["b_enc"] = theirs["b_gate" if cfg["architecture"] == "gated" else "b_enc"]
    if "threshold" in theirs:
        ours["log_threshold"] = folding.log_thresholds(theirs["threshold"])
    if "log_threshold" in theirs:
        ours["log_threshold"] = theirs["log_threshold"]
    if "topk_threshold" in theirs:
        ours["inference_threshold"] = theirs["topk_threshold"].to(ours["W_enc"].dtype)
    if "W_skip" in theirs:
        ours["W_skip"] = theirs["W_skip"].T.contiguous()
    return ours


def fold_whitening(found: Found, cfg: dict[str, Any], ours: dict[str, Tensor]) -> None:
    if cfg["normalize_activations"] != "covariance_whitening":
        return
    is_there = WHITENING in found.names and (SCALER not in found.names or found.json(SCALER).get("has_whitening", True))
    if not is_there:
        raise ValueError(
            f"{found.folder}: normalize_activations is covariance_whitening, whose matrix is in {WHITENING} beside the "
            "weights of a checkpoint, and that file is missing; load the run's result, or copy the file."
        )
    if cfg["architecture"] == "matching_pursuit":
        raise ValueError(f"{found.folder}: matching_pursuit with covariance_whitening cannot be folded.")
    parts = found.tensors(WHITENING)
    subtracts = bool(cfg.get("apply_b_dec_to_input", True))
    folding.fold_whitening(ours, parts["mean"], parts["matrix"], parts["inverse_matrix"], subtracts)
