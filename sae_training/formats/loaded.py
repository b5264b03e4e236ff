"""An autoencoder as a family of formats read it, and what a caller adds to what its files say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from torch import Tensor

from sae_training.config.placement import DeviceMap
from sae_training.config.types import UNKNOWN
from sae_training.formats import folding
from sae_training.formats.hook_names import layer_of, transformer_lens_name
from sae_training.formats.releases import OVERRIDES, facts_of

T = TypeVar("T")


class Facts(TypedDict, total=False):
    """What files may leave out."""

    k: int
    """Active latents per row."""
    model_name: str
    target_hook_point: str
    """What a transcoder predicts."""
    norm_factor: float
    """Factor that training multiplied activations with."""
    dataset_path: str
    context_size: int
    """Tokens per context of text, in place of what the files say."""
    device_map: DeviceMap
    """Where the language model's parts lie, in place of what the files say."""
    load_in_8bit: bool


@dataclass(frozen=True)
class Given:
    """What the caller says: which of several autoencoders is wanted, and what the files leave out."""

    hook_point: str | None = None
    layer: int | None = None
    k: int | None = None
    model_name: str | None = None
    target_hook_point: str | None = None
    norm_factor: float | None = None
    dataset_path: str | None = None
    context_size: int | None = None
    device_map: DeviceMap | None = None
    load_in_8bit: bool | None = None

    def __post_init__(self) -> None:
        if self.norm_factor is not None:
            factor_in(self.norm_factor, "norm_factor")

    @property
    def names_a_place(self) -> bool:
        return self.hook_point is not None or self.layer is not None

    def without_place(self) -> Given:
        return dataclasses.replace(self, hook_point=None, layer=None)


def factor_in(value: Any, what: str) -> float:
    """A factor of activations as a number. ValueError that names it by `what` unless it is finite and above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{what}: found {value!r}, expected a finite number above 0; correct it.")
    return float(value)


OF_ANOTHER_TEXT: dict[str, Any] = {
    "dataset_weights": (),
    "dataset_split": "train",
    "dataset_text_column": None,
    "is_dataset_tokenized": None,
    "streaming": None,
}
"""The fields that say how a text is read, for one of which nothing is known."""


@dataclass(frozen=True)
class Loaded:
    """One autoencoder of a file or folder: its config is known, its weights are read when they are asked for."""

    values: dict[str, Any]
    """Fields of LanguageModelSAERunnerConfig; `file_format` and `file_dtype` are among them."""
    weights: Callable[[], dict[str, Tensor]]
    """Reads the tensors, under the names of `SparseAutoencoder.weights`, in float32 (or float64) on the CPU."""
    remarks: tuple[str, ...] = ()
    """Warnings: what is doubtful about these files, or what their own program does otherwise."""
    convention: str = "activations are those that the files' own program reports"
    """In which units latent activations are."""
    is_crosscoder: bool = False
    """It reads or writes several places: `values` are fields of CrosscoderConfig, and the tensors a Crosscoder's."""
    problem: str | None = None
    """Why this one of many cannot be read as things are. The others can."""
    takes_norm_factor: bool = False
    """The caller's norm_factor is part of the weights, or says that a norm is in them."""
    at: Callable[[Given], Loaded] | None = None
    """Reads it again, as being at the place that the caller names, where its files do not name it."""


def needed(given: T | None, in_file: T | None, key: str, argument: str, where: Path) -> T:
    """What the caller gave, else what the file says. ValueError that names the key and the argument if neither does."""
    if given is not None:
        return given
    if in_file is None:
        raise ValueError(f"{where}: {key} is missing, and the weights do not tell it; give {argument}=...")
    return in_file


def place_and_text(
    given: Given,
    model_name: str | None = None,
    hook_point: str | None = None,
    layer: int | None = None,
    dataset_path: str | list[str] | None = None,
) -> dict[str, Any]:
    """The fields that say where activations come from. What nobody knows is UNKNOWN, or left out, never a default."""
    return {
        "model_name": given.model_name or model_name or UNKNOWN,
        "hook_point": hook_point or transformer_lens_name(given.hook_point or UNKNOWN, given.model_name or model_name),
        **layer_fields(layer if layer is not None else layer_given(given)),
        "dataset_path": given.dataset_path or dataset_path or UNKNOWN,
        "is_dataset_tokenized": None,
    }


def layer_given(given: Given) -> int | None:
    """The layer that the caller's place names, else the caller's layer."""
    named = layer_of(given.hook_point or "")
    return given.layer if named is None else named


def layer_fields(layer: int | None) -> dict[str, Any]:
    """The field of a layer; none where nobody knows it, so that it is told from layer 0."""
    return {} if layer is None else {"hook_point_layer": layer}


def completed(loaded: Loaded, given: Given, path: Path) -> Loaded:
    """What was read at `path`, with what the caller says of model, text and places, and what is known of a release."""
    values = dict(loaded.values)
    if loaded.is_crosscoder:  # whose config has other fields
        said = {"model_name": given.model_name, "dataset_path": given.dataset_path}
        return dataclasses.replace(loaded, values=values | {name: text for name, text in said.items() if text})
    facts = facts_of(path, str(values.get("file_format")))
    values |= {name: facts[name] for name in OVERRIDES if name in facts}
    loaded = in_other_units(loaded, values.get("normalize_activations"))
    for name in ("model_name", "hook_point", "target_hook_point", "dataset_path"):
        if name in facts and values.get(name) == UNKNOWN:
            values[name] = facts[name]
            if name == "hook_point" and (layer := layer_of(facts[name])) is not None:
                values["hook_point_layer"] = layer
    if given.model_name is not None:
        values["model_name"] = given.model_name
    if given.dataset_path is not None:
        values |= {**OF_ANOTHER_TEXT, "dataset_path": given.dataset_path}
    if given.context_size is not None:
        values |= fitting_batch(given.context_size)
    values |= {name: value for name in ("device_map", "load_in_8bit") if (value := getattr(given, name)) is not None}
    for name, place in (("hook_point", given.hook_point), ("target_hook_point", given.target_hook_point)):
        if place is not None and values.get(name) == UNKNOWN:
            values[name] = transformer_lens_name(place, values.get("model_name"))
    if given.norm_factor is not None and values.get("normalize_activations") == "expected_average_only_in":
        if values.get("target_hook_point") or values.get("architecture") == "matching_pursuit":
            raise ValueError(f"{path}: norm_factor: a transcoder or matching_pursuit cannot take one; leave it out.")
        values["normalize_activations"] = "none"
        made = partial(scaled, loaded.weights, given.norm_factor)
        loaded = dataclasses.replace(loaded, weights=made, takes_norm_factor=True)
    if "hook_point_layer" not in values:
        values |= layer_fields(layer_given(given))
    return dataclasses.replace(loaded, values=values)


def in_other_units(loaded: Loaded, used: str | None) -> Loaded:
    """With a remark and the units of activations, if what is known of a release replaces the file's normalisation."""
    in_file = loaded.values.get("normalize_activations")
    if used == in_file:
        return loaded
    remark = f"normalize_activations is {used}, as is known of this release, in place of the file's {in_file or 'none'}"
    convention = f"activations are in the units of normalised rows ({used})"
    return dataclasses.replace(loaded, remarks=(*loaded.remarks, remark), convention=convention)


def scaled(weights: Callable[[], dict[str, Tensor]], factor: float) -> dict[str, Tensor]:
    """The tensors, with a factor of activations as part of them."""
    tensors = weights()
    folding.fold_norm_factor(tensors, factor)
    return tensors


def sizes(d_in: int, d_sae: int) -> dict[str, Any]:
    """The fields that give d_sae latents."""
    return {"d_in": d_in, "n_latents": d_sae} if d_sae % d_in else {"d_in": d_in, "expansion_factor": d_sae // d_in}


def precisions(file_dtype: str) -> dict[str, Any]:
    """The fields that say what precision a file's weights have, and what they are computed in."""
    return {"file_dtype": file_dtype, "dtype": "float64" if file_dtype == "float64" else "float32"}


def fitting_batch(context_size: int) -> dict[str, Any]:
    """A batch of training that a config with such contexts accepts, though nothing is trained."""
    return {"context_size": context_size, "train_batch_size": min(4096, 320 * context_size)}


def describe(content: Any) -> str:
    """What a pickle holds, for messages."""
    if isinstance(content, dict):
        names = [repr(key[:40]) if isinstance(key, str) else f"a {type(key).__name__}" for key in list(content)[:8]]
        return f"a dict with {', '.join(names)}"
    return f"a {type(content).__name__}"
