"""Activations on disk: their format, reading it, and what is checked before anything is read.

    manifest.json               what comes from where, and each finished shard with its size and SHA-256
    rows/00000.safetensors      shuffled over the whole cache, for training: `tokens` (rows,), each hook (rows, d_in)
    contexts/00000.safetensors  as the text has them: `tokens` (prompts, context), each hook (prompts, context, d_in)

A shard counts once the manifest lists it. Activations are in one of four precisions; int8 has beside each hook a
float32 scale for each row, `<hook>.scale`, which times the integers gives the activations.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.config.fields import Source
from sae_training.config.io import CACHE_FIELDS
from sae_training.language_model.load import LanguageModel, fingerprint, revision
from sae_training.machine.files import write_text


def origin(cfg: Any, model: LanguageModel, n_held_out: int) -> dict[str, Any]:
    """Return what activations come from: MUST_AGREE, and what else is good to know."""
    return {name: getattr(cfg, name) for name in CACHE_FIELDS} | {
        "model_fingerprint": fingerprint(model),
        "lm_dtype": str(model.cfg.dtype).removeprefix("torch."),
        "dataset_weights": [weight / sum(cfg.dataset_weights) for weight in cfg.dataset_weights],
        "seqpos_slice": list(cfg.seqpos_slice),
        "tokenizer": getattr(model.tokenizer, "name_or_path", None),
        "model_revision": revision(model),
        "n_held_out": n_held_out,
    }


MANIFEST = "manifest.json"

FORMAT = 1

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}

MUST_AGREE = (*CACHE_FIELDS, "model_fingerprint")
"""What a run that trains on a cache must have in common with it; it may hold out fewer contexts than the cache."""

FIELD_OF = {"model_fingerprint": "model_name"}


@dataclass
class Shard:
    """A finished file; `n` counts its rows, or its contexts."""

    file: str
    n: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """manifest.json."""

    about: dict[str, Any]
    """Where the activations come from: MUST_AGREE, and what else is good to know."""
    sites: dict[str, int]
    """Width by hook."""
    dtype: str
    config: dict[str, Any]
    """The CacheActivationsRunnerConfig."""
    rows: list[Shard] = field(default_factory=list)
    contexts: list[Shard] = field(default_factory=list)
    complete: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    """What going on after a kill needs; at the end, where in the text the cache stops."""
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"cached_activations_path: {folder} holds no {MANIFEST}, expected a folder that "
            "`sae-training cache` wrote; give its path."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
        for form in ("rows", "contexts"):
            values[form] = [Shard(**shard) for shard in values[form]]
        for name in CACHE_FIELDS:  # an older cache was written with the default
            default = getattr(Source, name)
            values["about"].setdefault(name, list(default) if isinstance(default, tuple) else default)
        return Manifest(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error}); write the cache anew.") from error


# --------------------------------------------------------------------------------------------------------- precision


def encode(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """`rows` (..., d_in) in the precision of the disk and, for int8, the scale of each (...,), else None."""
    if dtype != "int8":
        stored = rows.to(DTYPES[dtype])
        if dtype == "float16" and bool((stored.isinf() & ~rows.isinf()).any()):
            raise ValueError(
                f"dtype: an activation of {rows.abs().max().item():.3g} is too large for float16, expected at most "
                "65504; use bfloat16, or int8."
            )
        return stored, None
    wide = rows.float()
    scale = wide.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale.unsqueeze(-1)).round().to(torch.int8), scale


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The inverse of `encode`, in float32 for int8, else as stored."""
    return stored if scale is None else stored.float() * scale.unsqueeze(-1)


def anew(folder: Path) -> str:
    return f"delete {folder} and write the cache anew."
