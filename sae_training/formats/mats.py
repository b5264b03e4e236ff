"""Files that mats_sae_training saved (.pt, .pkl, .pkl.gz): a pickled dict of "cfg" and "state_dict".

A pickle is a program. The unpicklers here build tensors, plain data and an empty stand-in for the pickled config class,
and refuse every other name, so that a stranger's file cannot run code.
"""

from __future__ import annotations

import collections
import gzip
import io
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _utils

CONFIG_MODULES = ("sae_training.", "sae_lens.")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognises(path: Path) -> bool:
    return path.name.endswith((".pt", ".pkl", ".pkl.gz"))


class PickledConfig:
    """Stands in for whatever config class the file names: holds its attributes and does nothing."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config values and the four parameters. Raise ValueError for anything that is not such a file."""
    try:
        content = read_torch_file(path) if path.suffix == ".pt" else read_pickle(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable autoencoder file: {error}") from error
    if not isinstance(content, dict) or not {"cfg", "state_dict"} <= content.keys():
        raise ValueError(f"{path}: expected a dict with 'cfg' and 'state_dict', found {describe(content)}.")
    state = content["state_dict"]
    missing = [name for name in PARAMETERS if name not in state]
    if missing:
        raise ValueError(f"{path}: the state_dict lacks {', '.join(missing)}; it holds {', '.join(state)}.")
    cfg = content["cfg"]
    tensors = {name: state[name].detach() for name in PARAMETERS}
    return config_values(cfg if isinstance(cfg, dict) else vars(cfg), tensors), tensors


def read_torch_file(path: Path) -> Any:
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(PickledConfig, name) for name in named if name.startswith(CONFIG_MODULES)]
    with torch.serialization.safe_globals([*stand_ins, types.SimpleNamespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_pickle(path: Path) -> Any:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return TensorUnpickler(file).load()


class TensorUnpickler(pickle.Unpickler):
    """Builds tensors, plain containers and stand-ins for configs, and raises UnpicklingError for every other name."""

    allowed = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("types", "SimpleNamespace"): types.SimpleNamespace,
        ("torch", "device"): torch.device,
        ("torch", "Size"): torch.Size,
        ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): lambda data: torch.load(
            io.BytesIO(data), map_location="cpu", weights_only=True
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(CONFIG_MODULES):
            return PickledConfig
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, which no autoencoder needs; it was not loaded."
        )


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
    if d_sae % d_in:
        raise ValueError(f"W_enc is ({d_in}, {d_sae}); expected d_sae to be a multiple of d_in.")
    values["device"] = str(values.get("device", "cpu"))
    values["dtype"] = tensors["W_enc"].dtype
    return values | {"d_in": d_in, "expansion_factor": d_sae // d_in}


def describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict with {', '.join(map(repr, list(content)[:8]))}"
    return f"a {type(content).__name__}"
