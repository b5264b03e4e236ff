"""An autoencoder on disk: cfg.json beside sae.safetensors, or both in one .safetensors file.

Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import config_from_dict, config_to_dict
from sae_training.formats.mats import PICKLE_ENDINGS, load_mats_file
from sae_training.formats.run_files import CHECKPOINTS, FINAL
from sae_training.machine.files import read_safetensors, step_number, write_safetensors, write_text

CONFIG_FILE = "cfg.json"

WEIGHTS_FILE = "sae.safetensors"

SPARSITY_FILE = "log_feature_sparsity.safetensors"


def save_weights(path: Path, tensors: dict[str, Tensor], cfg: Any) -> None:
    """Write to a folder, or to the file `path` if it ends in .safetensors (the config is in its metadata, key
    "cfg").
    """
    if path.name.endswith(PICKLE_ENDINGS):
        raise ValueError(
            f"save_model: {path} asks for a pickle, which can run code when it is loaded; give a folder, or a name "
            "that "
            "ends in .safetensors. (Old files of these kinds can still be loaded.)"
        )
    config_text = json.dumps(plain_config(cfg), indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, tensors, {"cfg": config_text})
        return
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    write_text(path / CONFIG_FILE, config_text)


def load_weights(path: Path, device: str | None = None) -> tuple[LanguageModelSAERunnerConfig, dict[str, Tensor]]:
    """Config and tensors of a run folder, a folder with cfg.json, a .safetensors, or an old pickle."""
    values, tensors = read_weights(path)
    cfg = config_from_dict(values, strict=False)
    if cfg.normalize_activations == "expected_average_only_in":
        raise ValueError(
            f"{path}: its config has normalize_activations {cfg.normalize_activations!r}, so its weights expect scaled "
            "activations by a factor that it does not hold; fold the factor into the weights and set it to 'none'."
        )
    device = usable_device(device or cfg.device)
    return dataclasses.replace(cfg, device=device), tensors


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        folder = weights_folder(path)
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return values, read_safetensors(folder / WEIGHTS_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a run folder, a checkpoint folder, a .safetensors, or an old "
            ".pt / .pkl.gz."
        )
    if path.name.endswith(PICKLE_ENDINGS):
        return load_mats_file(path)
    if path.suffix == ".safetensors":
        beside = path.parent / CONFIG_FILE
        values = config_in_metadata(path)
        if values is None and beside.is_file():
            values = json.loads(beside.read_text(encoding="utf-8"))
        if values is None:
            raise ValueError(
                f"{path}: holds no config, and there is no {CONFIG_FILE} beside it; one of the two is needed."
            )
        return values, read_safetensors(path)
    raise ValueError(f"{path}: unknown kind of file; expected .safetensors, .pt, .pkl or .pkl.gz.")


def weights_folder(path: Path) -> Path:
    """The folder with the weights, for a run folder (its final/, else its newest checkpoint) or such a folder
    itself.
    """
    steps = sorted((path / CHECKPOINTS).glob("step_*"), key=step_number, reverse=True)
    # Of several autoencoders that are still in training, the run's checkpoints hold a folder each.
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
        "checkpoints/. "
        f"It holds: {', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'}."
    )


def usable_device(device: str) -> str:
    kind = torch.device(device).type
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    return "cpu" if missing else device


def plain_config(cfg: Any) -> dict[str, Any]:
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        return config_to_dict(cfg)
    return {
        name: value
        if isinstance(value, (int, float, str, bool, list, type(None)))
        else str(value).removeprefix("torch.")
        for name, value in vars(cfg).items()
    }


def config_in_metadata(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); use another copy.") from error
    return json.loads(metadata["cfg"]) if "cfg" in metadata else None
