"""Files that mats_sae_training saved (.pt, .pkl, .pkl.gz): a pickled dict of "cfg" and "state_dict"."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded, sizes
from sae_training.formats.pickles import copied

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognises(found: Found) -> bool:
    if not found.is_pickle:
        return False
    content = found.pickle()
    return isinstance(content, dict) and {"cfg", "state_dict"} <= content.keys()


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The four parameters, and config values. ValueError if a parameter is missing."""
    content, path = found.pickle(), found.path
    state = content["state_dict"]
    missing = [name for name in PARAMETERS if name not in state]
    if missing:
        raise ValueError(f"{path}: the state_dict lacks {', '.join(missing)}; it holds {', '.join(state)}.")
    cfg = content["cfg"]
    values = config_values(cfg if isinstance(cfg, dict) else vars(cfg), state)
    return {name_of(path): Loaded(values, partial(weights, state))}


def name_of(path: Path) -> str:
    return path.name.split(".")[0]


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {name: copied(state[name], transposed=name == "W_enc") for name in PARAMETERS}
    ours["W_enc"] = ours["W_enc"].T  # latent by latent, as it is in our memory
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
    values["device"] = str(values.get("device", "cpu"))
    values["dtype"] = tensors["W_enc"].dtype
    dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    return values | sizes(d_in, d_sae) | {"file_format": "mats", "file_dtype": dtype}
