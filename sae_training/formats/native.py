"""Our own files: a folder with cfg.json and sae.safetensors, or one .safetensors file with the config in its metadata.

A run folder is read as well: its final/, or else its newest checkpoint. Nothing is ever pickled.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_to_dict
from sae_training.config.types import UNKNOWN
from sae_training.formats import safetensors_files
from sae_training.formats.found import Found
from sae_training.formats.json_files import parse_object, read_object
from sae_training.formats.loaded import Given, Loaded
from sae_training.machine.files import step_number, write_safetensors, write_text
from sae_training.machine.run_files import CHECKPOINTS, FINAL
from sae_training.parallel.shard import WHOLE, Shard

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
SPARSITY_FILE = "log_feature_sparsity.safetensors"


class NoWeights(FileNotFoundError):
    """A folder holds no autoencoder of ours."""


def recognises(found: Found) -> bool:
    return found.is_folder or found.path.suffix == ".safetensors"


def holds_weights(found: Found) -> bool:
    """Whether a folder holds an autoencoder of ours itself, not in a folder below."""
    return found.is_folder and found.has(CONFIG_FILE, WEIGHTS_FILE)


def is_whole(found: Found) -> bool:
    """Whether a file of ours has its config in itself."""
    return found.path.suffix == ".safetensors" and "cfg" in found.header(found.path.name).metadata


def read(found: Found, given: Given) -> dict[str, Loaded]:
    path = found.path
    if found.is_folder:
        folder = weights_folder(path)
        values = without_layer(read_object(folder / CONFIG_FILE))
        return {path.name: Loaded(values, partial(safetensors_files.tensors, folder / WEIGHTS_FILE))}
    metadata = found.header(path.name).metadata
    if not is_whole(found) and CONFIG_FILE not in found.names:
        raise ValueError(f"{path}: holds no config, and there is no {CONFIG_FILE} beside it; one of the two is needed.")
    values = parse_object(metadata["cfg"], str(path)) if "cfg" in metadata else found.json(CONFIG_FILE)
    values = without_layer(values)
    return {path.stem: Loaded(values, partial(safetensors_files.tensors, path))}


def without_layer(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out a layer 0 that no one said: of a place that files of another program did not name."""
    is_unsaid = values.get("hook_point") == UNKNOWN and values.get("hook_point_layer") == 0
    return {name: value for name, value in values.items() if not (is_unsaid and name == "hook_point_layer")}


def weights_folder(path: Path) -> Path:
    """`path` if it holds weights, else its final/, else its newest checkpoint. FileNotFoundError if there is none."""
    steps = sorted((path / CHECKPOINTS).glob("step_*"), key=step_number, reverse=True)
    # While several autoencoders are trained together, the checkpoints of their run hold a folder for each of them.
    together = sorted((path.resolve().parent / CHECKPOINTS).glob("step_*"), key=step_number, reverse=True)
    for folder in (path, path / FINAL, *steps, *(step / path.resolve().name for step in together)):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    several = sorted(folder.parent.name for folder in path.glob(f"*/{FINAL}") if (folder / WEIGHTS_FILE).is_file())
    if several:
        raise FileNotFoundError(
            f"{path}: holds the folders of {len(several)} autoencoders, expected that of one; give one of "
            f"{', '.join(str(path / name) for name in several[:10])}."
        )
    raise NoWeights(
        f"{path}: holds no weights; expected {CONFIG_FILE} and {WEIGHTS_FILE} in it, in its final/ or in its "
        f"checkpoints/. It holds: {', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'}."
    )


def write(path: Path, tensors: dict[str, Tensor], cfg: Any, shard: Shard = WHOLE) -> None:
    """Write to the folder `path`, or to one file if `path` ends in .safetensors."""
    if not shard.is_all:
        raise ValueError(
            f"save_model: this process holds latents {shard.first} to {shard.end - 1} of {shard.d_sae}; the folder of "
            "the run (final/, snapshots/, checkpoints/) holds all of them: load that."
        )
    if path.name.endswith((".pt", ".pkl", ".pkl.gz")):
        raise ValueError(
            f"save_model: {path} asks for a pickle, which can run code when it is loaded; give a folder, or a name "
            "that ends in .safetensors. (Old files of these kinds can still be loaded.)"
        )
    config_text = json.dumps(plain_values(cfg), indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, tensors, {"cfg": config_text})
        return
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    write_text(path / CONFIG_FILE, config_text)


def plain_values(cfg: Any) -> dict[str, Any]:
    """The attributes of a config, of whatever class, in JSON types."""
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        return config_to_dict(cfg)
    plain = (int, float, str, bool, list, type(None))
    return {
        name: value if isinstance(value, plain) else str(value).removeprefix("torch.")
        for name, value in vars(cfg).items()
    }
