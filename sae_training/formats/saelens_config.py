"""The cfg.json of SAELens 3 to 6, and of mats files that it rewrote, in our vocabulary.

Names changed from version to version, and defaults with them. `in_one_vocabulary` gives all of them the form of 6,
where what concerns the language model lies under "metadata".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sae_training.config.types import HOOKS_WITH_HEADS
from sae_training.formats.hook_names import layer_of, transformer_lens_name
from sae_training.formats.loaded import Given, fitting_batch, place_and_text

OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}

OLD_DEFAULTS: dict[str, Any] = {
    "apply_b_dec_to_input": True,
    "activation_fn": "relu",
    "architecture": "standard",
    "prepend_bos": True,
}

CAME_WITH_4 = ("architecture", "model_from_pretrained_kwargs", "dataset_trust_remote_code", "seqpos_slice")
"""Fields of a config that version 3 did not write. It had normalize_activations as True or False, 4 has a name."""

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")

ARCHITECTURES = {
    "standard": "standard",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "jumprelu": "jumprelu",
    "matching_pursuit": "matching_pursuit",
    "batchtopk": "batchtopk",  # in checkpoints only; what training ends with is saved as jumprelu
    "matryoshka_batchtopk": "matryoshka",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Theirs, and ours."""

NORMALIZATIONS = {
    "none": "none",
    "expected_average_only_in": "none",  # a factor, which is folded if it is known
    "covariance_whitening": "none",  # a matrix, which is folded
    "constant_norm_rescale": "constant_norm_rescale",
    "layer_norm": "layer_norm_unbiased",
}


def in_one_vocabulary(cfg: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of any version with the names and defaults of 6. ValueError for an architecture that is not read."""
    new, version = dict(cfg), major_version(cfg)
    if not isinstance(new.get("metadata"), dict):
        new = OLD_DEFAULTS | {OLD_NAMES.get(name, name): value for name, value in new.items() if value is not None}
        new["metadata"] = dict(new)
        kwargs = new.get("activation_fn_kwargs") or {}
        if new["activation_fn"] == "topk":
            new["architecture"], new["activation_fn"] = "topk", "relu"
        if "k" in kwargs:
            new["k"] = kwargs["k"]
    elif "architecture" not in new:
        raise ValueError(f"{where}: architecture is missing, expected one of {', '.join(ARCHITECTURES)}.")
    new["metadata"] = {**new["metadata"], "major_version": version}
    normalization = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if normalization is True else normalization
    check_known(new, where)
    return new


def check_known(cfg: Mapping[str, Any], where: str) -> None:
    """ValueError for what this package does not read, with the reason."""
    architecture, activation = cfg["architecture"], cfg.get("activation_fn", "relu")
    if architecture == "temporal":
        raise ValueError(
            f"{where}: architecture temporal is a model of sequences (attention over positions, and codes of what it "
            "does not predict), not a dictionary of vectors; load it with SAELens."
        )
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{where}: architecture: found {architecture!r}, expected one of {', '.join(ARCHITECTURES)}; an "
            "architecture of one's own is known to its own code alone."
        )
    if activation not in ("relu", "tanh-relu") or activation != "relu" and architecture != "standard":
        raise ValueError(f"{where}: activation_fn: found {activation!r} with {architecture}, expected relu.")
    check_reshaping(cfg, where)
    if cfg["normalize_activations"] not in NORMALIZATIONS:
        raise ValueError(
            f"{where}: normalize_activations: found {cfg['normalize_activations']!r}, expected one of "
            f"{', '.join(NORMALIZATIONS)}."
        )
    if architecture in TRANSCODERS and cfg.get("apply_b_dec_to_input"):
        raise ValueError(
            f"{where}: apply_b_dec_to_input: found True, expected False: {architecture} has another output."
        )


def check_reshaping(cfg: Mapping[str, Any], where: str) -> None:
    """ValueError for heads put side by side at a hook that has none, and for ways of reshaping that are not known."""
    reshaping, hook_name = cfg.get("reshape_activations") or "none", cfg["metadata"].get("hook_name")
    if reshaping not in ("none", "hook_z"):
        raise ValueError(f"{where}: reshape_activations: found {reshaping!r}, expected none or hook_z.")
    if reshaping == "hook_z" and hook_name is not None and not str(hook_name).endswith(HOOKS_WITH_HEADS):
        raise ValueError(
            f"{where}: reshape_activations: found hook_z with hook_name {hook_name!r}, expected a hook with an axis of "
            "heads, which are put side by side; SAELens refuses it too; correct one of them."
        )


def version_of(cfg: Mapping[str, Any]) -> str | None:
    """The version of SAELens that wrote a config; None if the config does not say."""
    metadata = cfg.get("metadata") or {}
    names = ("sae_lens_version", "sae_lens_training_version")
    return next((str(part[name]) for part in (cfg, metadata) for name in names if part.get(name)), None)


def major_version(cfg: Mapping[str, Any]) -> int:
    """The first number of the version; without one, 4 for configs with a field that came with 4, else 3.

    `cfg` as the file has it: with defaults filled in, every config has the fields of 4.
    """
    digits = re.match(r"\d+", version_of(cfg) or "")
    if digits:
        return int(digits[0])
    if isinstance(cfg.get("metadata"), dict):
        return 6
    normalization = cfg.get("normalize_activations")
    is_new = isinstance(normalization, str) or any(cfg.get(name) is not None for name in CAME_WITH_4)
    return 4 if is_new and not isinstance(normalization, bool) else 3


def config_values(cfg: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """The fields of our config that do not depend on sizes; `cfg` as `in_one_vocabulary` gives it."""
    about = cfg["metadata"]
    hook_point, layer = place_in(about, given.model_name or about.get("model_name"))
    values = place_and_text(given, about.get("model_name"), hook_point, layer, about.get("dataset_path"))
    values |= {
        "architecture": ARCHITECTURES[cfg["architecture"]],
        "normalize_activations": NORMALIZATIONS[cfg["normalize_activations"]],
        "apply_b_dec_to_input": bool(cfg.get("apply_b_dec_to_input", True)),
        "hook_point_head_index": about.get("hook_head_index"),
        "model_processing": "default" if is_processed(about) else "none",
        "prepend_bos": bool(about.get("prepend_bos", True)),
        "exclude_special_tokens": bool(about.get("exclude_special_tokens", False)),
        "pack_sequences": not about.get("disable_concat_sequences", False),
        "seqpos_slice": positions(about.get("seqpos_slice")),
        "device": str(cfg.get("device") or "cpu"),
    }
    if isinstance(about.get("context_size"), int):
        values |= fitting_batch(max(2, about["context_size"]))
    if cfg["architecture"] == "standard":
        values["activation_fn"] = cfg.get("activation_fn", "relu")
    if cfg["architecture"] == "matching_pursuit":
        names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
        values |= {name: cfg[name] for name in names if name in cfg}
    if cfg["architecture"] == "matryoshka_batchtopk" and cfg.get("matryoshka_widths"):
        values["matryoshka_widths"] = tuple(cfg["matryoshka_widths"])
    return values


def place_in(about: Mapping[str, Any], model_name: str | None) -> tuple[str | None, int | None]:
    """The hook and its layer: that of the name, else the one of its own field, which also fills {layer}."""
    name, layer = about.get("hook_name"), about.get("hook_layer")
    if not isinstance(name, str) or not name:
        return None, layer
    filled = name.replace("{layer}", str(layer)) if layer is not None else name
    hook_point = transformer_lens_name(filled, model_name)
    in_name = layer_of(hook_point)
    return hook_point, layer if in_name is None else in_name


def is_processed(about: Mapping[str, Any]) -> bool:
    """Whether the model's weights were folded and centred: by default before version 4, then if the config says so."""
    kwargs = about.get("model_from_pretrained_kwargs") or {}
    return bool(kwargs.get("center_writing_weights", about["major_version"] < 4))


def positions(seqpos_slice: Any) -> tuple[int | None, ...]:
    """Their arguments of `slice`, [None] for all positions, as start and stop."""
    if not seqpos_slice or list(seqpos_slice) == [None]:
        return ()
    part = slice(*seqpos_slice)
    return (part.start, part.stop) if part.step is None else (part.start, part.stop, part.step)
