"""Our own files: a folder with cfg.json and sae.safetensors, or one .safetensors file with the config in its metadata.

A run folder is read as well: its final/, or else its newest checkpoint. Nothing is ever pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_to_dict
from sae_training.formats.run_files import CHECKPOINTS, FINAL
from sae_training.machine.files import read_safetensors, step_number, write_safetensors, write_text

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
SPARSITY_FILE = "log_feature_sparsity.safetensors"


def recognises(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".safetensors"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        folder = weights_folder(path)
        return read_config(folder / CONFIG_FILE), read_safetensors(folder / WEIGHTS_FILE)
    beside, values = path.parent / CONFIG_FILE, config_in_metadata(path)
    if values is None and not beside.is_file():
        raise ValueError(f"{path}: holds no config, and there is no {CONFIG_FILE} beside it; one of the two is needed.")
    return read_config(beside) if values is None else values, read_safetensors(path)


def read_config(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def config_in_metadata(path: Path) -> dict[str, Any] | None:
    """The config that a .safetensors file holds; None if it holds none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); use another copy.") from error
    return json.loads(metadata["cfg"]) if "cfg" in metadata else None


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
    raise FileNotFoundError(
        f"{path}: holds no weights; expected {CONFIG_FILE} and {WEIGHTS_FILE} in it, in its final/ or in its "
        f"checkpoints/. It holds: {', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'}."
    )


def write(path: Path, tensors: dict[str, Tensor], cfg: Any) -> None:
    """Write to the folder `path`, or to one file if `path` ends in .safetensors."""
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
