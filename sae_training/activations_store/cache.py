"""The format of activations on disk: the manifest, the precisions, and what a run must have in common with a cache.

    manifest.json               where the activations come from; size and SHA-256 of each finished shard
    rows/00000.safetensors      shuffled over the whole cache: `tokens` (rows,), each hook (rows, d_in)
    contexts/00000.safetensors  in the order of the text: `tokens` (prompts, context), hooks (prompts, context, d_in)
    unembedding.safetensors     beside contexts: what an analysis needs of the language model (`cache_parts.py`)

A shard counts once the manifest lists it. Activations are in one of four precisions. With int8 each hook has a float32
scale for each row, `<hook>.scale`; integers times scale are the activations.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_training.activations_store.finiteness import non_finite
from sae_training.config.fields import Source
from sae_training.config.io import CACHE_FIELDS, config_to_dict
from sae_training.language_model.load import LanguageModel, fingerprint, revision
from sae_training.machine.files import write_text
from sae_training.machine.precision import dtype_name

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}

MUST_AGREE = (*CACHE_FIELDS, "model_fingerprint")
"""What a run that trains on a cache must have in common with it. (It may hold out fewer contexts than the cache.)"""

FIELD_OF = {"model_fingerprint": "model_name"}
"""The config field to change where the entry is none itself."""


def origin(cfg: Any, model: LanguageModel, n_held_out: int) -> dict[str, Any]:
    """Return what activations come from: MUST_AGREE, and what else is good to know."""
    values = config_to_dict(cfg)
    return {name: values[name] for name in CACHE_FIELDS} | {
        "model_fingerprint": fingerprint(model),
        "lm_dtype": dtype_name(model.cfg.dtype),
        "dataset_weights": [weight / sum(cfg.dataset_weights) for weight in cfg.dataset_weights],
        "tokenizer": getattr(model.tokenizer, "name_or_path", None),
        "model_revision": revision(model),
        "n_held_out": n_held_out,
    }


@dataclass
class Shard:
    """A finished file of `n` rows or contexts."""

    file: str
    n: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """The content of manifest.json."""

    about: dict[str, Any]
    """Where the activations come from (`origin`)."""
    sites: dict[str, int]
    """The width of each hook by its name."""
    dtype: str
    """The precision of the activations, a name of DTYPES."""
    config: dict[str, Any]
    """The CacheActivationsRunnerConfig without what does not change the content."""
    rows: list[Shard] = field(default_factory=list)
    contexts: list[Shard] = field(default_factory=list)
    complete: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    """What continuing after a kill needs; once complete, the position in the text where the cache stops."""
    format: int = FORMAT
    unembedding: Shard | None = None
    """What an analysis needs of the language model; None in a cache of an earlier version, or of rows alone."""

    def save(self, folder: Path) -> None:
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n", last=True)


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
        if (part := values.get("unembedding")) is not None:
            values["unembedding"] = Shard(**part)
        for name in CACHE_FIELDS:  # an older cache was written with the default
            default = getattr(Source, name)
            values["about"].setdefault(name, list(default) if isinstance(default, tuple) else default)
        return Manifest(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error}); write the cache anew.") from error


# --------------------------------------------------------------------------------------------------------- precision


def to_stored(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Return `rows` (..., d_in) in the precision of the files and, for int8, their scales (...,), else None."""
    if dtype != "int8":
        stored = rows.to(DTYPES[dtype])
        if stored.dtype != rows.dtype and bool((non_finite(stored) & ~non_finite(rows)).any()):
            wider = "bfloat16, or int8" if dtype == "float16" else "float32"
            raise ValueError(
                f"dtype: found an activation of {rows.abs().max().item():.3g}, expected at most "
                f"{torch.finfo(stored.dtype).max:.5g}, the largest of {dtype}; use {wider}."
            )
        return stored, None
    wide = rows.float()
    scale = wide.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale.unsqueeze(-1)).round().to(torch.int8), scale


def from_stored(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Return the rows that `to_stored` was given: float32 for int8, else in the precision of the files."""
    return stored if scale is None else stored.float() * scale.unsqueeze(-1)


# -------------------------------------------------------------------------------------------------------------- text


def position_to_json(position: dict[str, Any]) -> dict[str, Any]:
    """Return a position in the text (the state of a TokenStream) in JSON types, for the manifest."""
    return json.loads(json.dumps(position | {"pending": position["pending"].tolist()}))


def position_from_json(position: dict[str, Any]) -> dict[str, Any]:
    """Return the position that `position_to_json` was given."""
    return position | {"pending": torch.tensor(position["pending"], dtype=torch.int64)}
