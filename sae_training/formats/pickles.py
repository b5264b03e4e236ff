"""Pickled files, read without running anything in them.

A pickle is a program. The unpicklers here build tensors, plain data and empty stand-ins for the config classes of known
programs, and refuse every other name, so that a stranger's file cannot run code.
"""

from __future__ import annotations

import collections
import gzip
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import _utils

STAND_INS = ("sae_training.", "sae_lens.")
"""Modules whose classes are configs, of which the attributes are wanted and nothing else."""


class StandIn:
    """Stands in for whatever config class the file names: holds its attributes and does nothing."""


def read(path: Path) -> Any:
    """What a .pt, .pth, .pkl or .pkl.gz holds. ValueError for a damaged file, and for one that asks for more."""
    try:
        return read_torch_file(path) if path.suffix in (".pt", ".pth") else read_pickle(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable autoencoder file: {error}") from error


def read_torch_file(path: Path) -> Any:
    """Tensors of the zip format, which torch has written since 1.6, are read from the disk when they are used."""
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(StandIn, name) for name in named if name.startswith(STAND_INS)]
    with torch.serialization.safe_globals([*stand_ins, types.SimpleNamespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


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
        if f"{module}.".startswith(STAND_INS):
            return StandIn
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, which no autoencoder needs; it was not loaded."
        )


def tensors_by_name(content: Any, prefix: str = "", depth: int = 3) -> dict[str, torch.Tensor]:
    """The tensors in dicts of dicts, by their keys with dots between them."""
    found: dict[str, torch.Tensor] = {}
    for key, part in content.items() if isinstance(content, dict) and depth else ():
        if isinstance(part, torch.Tensor):
            found[f"{prefix}{key}"] = part
        elif isinstance(key, str):
            found |= tensors_by_name(part, f"{prefix}{key}.", depth - 1)
    return found
