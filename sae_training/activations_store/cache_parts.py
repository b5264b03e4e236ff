"""What a cache of contexts holds of the language model, so that an analysis needs no other part of it.

That is the unembedding, what the neurons of the hooks' layers write, and for `max_activation_norm_multiple` the median
norms: one file, `unembedding.safetensors`, in the precision of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sae_training.activations_store.cache import Manifest, Shard, read_manifest
from sae_training.activations_store.position_rule import median_norms
from sae_training.activations_store.store import ActivationsStore
from sae_training.config.io import with_defaults
from sae_training.language_model.load import language_model_dtype, load_tokenizer
from sae_training.language_model.model_parts import ModelParts, PartsConfig
from sae_training.language_model.tokenizer import tokenizer_of
from sae_training.language_model.unembedding import tensors_of
from sae_training.machine.files import read_safetensors, sha256, write_safetensors
from sae_training.machine.paths import same_or_moved

FILE = "unembedding.safetensors"


def write_parts(folder: Path, manifest: Manifest, store: ActivationsStore) -> None:
    """Write the file and list it in the manifest, unless it is listed and there."""
    path = folder / FILE
    if manifest.unembedding is not None and path.is_file():
        return
    cfg, model, sites = with_defaults(store.cfg), store.model, store.sites.all
    has_norms = cfg.max_activation_norm_multiple is not None
    facts = {
        "d_vocab": model.cfg.d_vocab,
        "n_ctx": model.cfg.n_ctx,
        "has_tokenizer": tokenizer_of(model) is not None,
        "median_norms": dict(median_norms(cfg, model, store.text.tokens, sites)) if has_norms else {},
    }
    tensors = {name: tensor.cpu() for name, tensor in tensors_of(model, sites).items()}
    write_safetensors(path, tensors, {"model": json.dumps(facts)})
    manifest.unembedding = Shard(FILE, len(tensors), path.stat().st_size, sha256(path))
    manifest.save(folder)


def bytes_of_parts(store: ActivationsStore) -> int:
    """Return about how many bytes the file takes."""
    return sum(tensor.nbytes for tensor in tensors_of(store.model, store.sites.all).values())


def check_parts(folder: Path, manifest: Manifest) -> None:
    """Raise ValueError if the content of the file is not what was written."""
    path, written = folder / FILE, manifest.unembedding
    if written is not None and path.is_file() and (found := sha256(path)) != written.sha256:
        raise ValueError(
            f"{path}: found content of SHA-256 {found[:16]}, but {written.sha256[:16]} was written; delete this file "
            "alone, and the `cache` command that wrote it writes it again."
        )


def parts_on_disk(folder: Path, cfg: Any, hooks: Iterable[str]) -> ModelParts | None:
    """Return what a cache holds of the language model of `cfg`, to stand in for it at `hooks`.

    None where the model itself is needed: for a cache without the file, and for one that does not fit, of which
    `open_cache` says in what. ValueError if the file is damaged.
    """
    manifest, path = read_manifest(folder), folder / FILE
    fits = manifest.complete and same_or_moved(manifest.about["model_name"], cfg.model_name)
    if manifest.unembedding is None or not path.is_file() or not fits or not {*hooks} <= manifest.sites.keys():
        return None
    check_parts(folder, manifest)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["model"])
    tensors = {name: tensor.to(cfg.device) for name, tensor in read_safetensors(path).items()}
    # The precision that the model would have, which `open_cache` compares with that of the cache.
    dtype = language_model_dtype(getattr(cfg, "lm_dtype", "auto"), str(cfg.device))
    return ModelParts(
        PartsConfig(facts["d_vocab"], facts["n_ctx"], dtype),
        load_tokenizer(cfg.model_name) if facts["has_tokenizer"] else None,
        manifest.about["model_fingerprint"],
        tensors,
        facts["median_norms"],
    )
