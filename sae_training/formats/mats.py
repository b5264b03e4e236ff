"""Files that mats_sae_training saved (.pt, .pkl, .pkl.gz): a pickled dict of "cfg" and "state_dict".

From February to May 2024 it saved groups: a pickled object with `autoencoders`, a list or a dict of modules with their
configs. Its class and theirs are stand-ins here, whose attributes hold the parameters.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.config.types import UNKNOWN
from sae_training.formats import folding
from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, sizes
from sae_training.formats.pickles import StandIn, copied

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
SCALING_FACTOR = "scaling_factor"
"""(d_sae,), by which activations are multiplied where they are decoded; ones, unless it was trained."""


def recognises(found: Found) -> bool:
    return found.is_pickle and bool(members(found.pickle()))


def members(content: Any) -> dict[str, Any]:
    """The autoencoders by key: dicts with "cfg" and "state_dict", or modules. {} for files of other kinds."""
    if isinstance(content, dict):
        return {"": content} if {"cfg", "state_dict"} <= content.keys() else {}
    if not isinstance(content, StandIn):
        return {}
    inside = vars(content).get("autoencoders", content)
    ones = inside if isinstance(inside, dict) else dict(enumerate(inside if isinstance(inside, list) else [inside]))
    return {str(key): one for key, one in ones.items() if {"cfg", "_parameters"} <= vars_of(one).keys()}


def vars_of(content: Any) -> dict[str, Any]:
    return vars(content) if isinstance(content, StandIn) else {}


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The four parameters, and config values. ValueError if a parameter is missing."""
    ones, path = members(found.pickle()), found.path
    return {key or name_of(path): read_one(path, one) for key, one in by_place(ones).items()}


def by_place(ones: dict[str, Any]) -> dict[str, Any]:
    """The autoencoders of a list by their places, or by place and index where several are at one."""
    if len(ones) < 2 or not all(key.isdecimal() for key in ones):
        return ones if len(ones) > 1 else dict.fromkeys([""], *ones.values())
    places = [place_of(vars_of(vars_of(one)["cfg"])) for one in ones.values()]
    names = [place if places.count(place) == 1 else f"{place}_{key}" for key, place in zip(ones, places, strict=True)]
    return dict(zip(names, ones.values(), strict=True))


def place_of(cfg: dict[str, Any]) -> str:
    return str(cfg.get("hook_point")).replace("{layer}", str(cfg.get("hook_point_layer")))


def read_one(path: Path, content: Any) -> Loaded:
    state = content["state_dict"] if isinstance(content, dict) else vars(content)["_parameters"]
    missing = [name for name in PARAMETERS if name not in state]
    if missing:
        raise ValueError(f"{path}: the state_dict lacks {', '.join(missing)}; it holds {', '.join(state)}.")
    unknown = [str(name) for name in state if state[name] is not None and name not in (*PARAMETERS, SCALING_FACTOR)]
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)}: not a tensor of mats' that is read; use a copy without.")
    cfg = content["cfg"] if isinstance(content, dict) else vars(content)["cfg"]
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    values = config_values(cfg, state)
    if values["hook_point"] != UNKNOWN:
        values["hook_point"] = place_of(cfg)
    return Loaded(values, partial(weights, state))


def name_of(path: Path) -> str:
    return path.name.split(".")[0]


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {name: copied(state[name], transposed=name == "W_enc") for name in PARAMETERS}
    ours["W_enc"] = ours["W_enc"].T  # latent by latent, as it is in our memory
    if isinstance(state.get(SCALING_FACTOR), Tensor):
        factors = copied(state[SCALING_FACTOR])
        if factors.shape != (len(ours["W_dec"]),):
            raise ValueError(f"{SCALING_FACTOR}: found shape {tuple(factors.shape)}, expected ({len(ours['W_dec'])},).")
        folding.scale_decoder(ours, factors)
    return ours


def config_values(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The old attributes as config fields, with sizes from the tensors, without what concerns only that run's data."""
    d_in, d_sae = tensors["W_enc"].shape
    values = {name: value for name, value in cfg.items() if not name.startswith("_")}
    batch = values.get("store_batch_size")
    if isinstance(batch, (list, tuple)):  # (32,) by a stray comma in the original's default
        values["store_batch_size"] = batch[0]
    for name in ("use_cached_activations", "feature_sampling_method", "checkpoint_path"):
        values.pop(name, None)
    # Sizes that our configs might refuse, but that do not matter to the weights.
    for name in ("train_batch_size", "n_batches_in_buffer", "total_training_tokens"):
        values.pop(name, None)
    values["lr_scheduler_name"] = values.get("lr_scheduler_name") or "constant"
    for name in ("model_name", "hook_point", "dataset_path"):
        values[name] = values.get(name) or UNKNOWN
    if isinstance(values.get("normalize_activations"), bool):
        values["normalize_activations"] = "expected_average_only_in" if values["normalize_activations"] else "none"
    values["device"] = str(values.get("device", "cpu"))
    values["dtype"] = tensors["W_enc"].dtype
    dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    return values | sizes(d_in, d_sae) | {"file_format": "mats", "file_dtype": dtype}
