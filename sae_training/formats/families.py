"""All families of formats, and whether what lies at a path is of one of them."""

from __future__ import annotations

from pathlib import Path

from sae_training.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    e2e_sae,
    gemma_crosscoders,
    gemma_scope,
    llama_scope,
    llamascopium_crosscoders,
    mats,
    model_diffing,
    native,
    openai,
    refused,
    saelens,
    single_files,
    sparsify,
)
from sae_training.formats.doubts import blamed_on
from sae_training.formats.found import Found
from sae_training.formats.loaded import describe

FAMILIES = (
    gemma_crosscoders,
    circuit_tracer_clt,
    llamascopium_crosscoders,
    model_diffing,
    gemma_scope,
    circuit_tracer,
    saelens,
    sparsify,
    dictionary_learning,
    openai,
    e2e_sae,
    llama_scope,
    single_files,
    refused,
    mats,
    native,
)
"""The first that recognises a thing reads it. native is the last: it says what is missing where there is nothing."""


def is_one(found: Found) -> bool:
    """Whether a folder itself holds what a family reads. (native takes every folder, to say what is missing.)"""
    with blamed_on(found.path):
        return native.holds_weights(found) or any(f.recognises(found) for f in FAMILIES if f is not native)


def is_one_or_damaged(folder: Path) -> bool:
    try:
        return is_one(Found(folder))
    except (ValueError, OSError):
        return True


def is_file_of_one(found: Found) -> bool:
    """Whether a file by itself is what a family reads. ValueError or OSError if it cannot be opened, or its config."""
    with blamed_on(found.path):
        return native.is_whole(found) or any(f.recognises(found) for f in FAMILIES if f is not native)


def unknown(found: Found) -> str:
    """Say that no family reads what was found."""
    if found.is_pickle:
        held = describe(found.pickle())
        return f"{found.path}: found {held}, which no format that is read has; check the file."
    return f"{found.path}: unknown kind of file; expected .safetensors, .npz, .pt, .pth, .pkl or .pkl.gz."
