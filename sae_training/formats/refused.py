"""Files that are recognised and not read, with the reason: no dictionaries of vectors, or rules unknown.

Codebooks are refused by the family that they belong to, and pickled objects of other programs' classes by `pickles`.
"""

from __future__ import annotations

from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded

OPENMOSS = ("config.json", "sae_weights.safetensors")
TEMPORAL = ("conf.yaml", "latest_ckpt.safetensors")

KINDS_OF_OPENMOSS = {
    "lorsa": "is sparse attention over positions, not a dictionary of vectors",
    "molt": "adds up transforms of low rank, not a dictionary of vectors",
}


def recognises(found: Found) -> bool:
    return reason(found) is not None


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """ValueError with the reason."""
    raise ValueError(f"{found.path}: {reason(found)}.")


def reason(found: Found) -> str | None:
    """What the files are and why they are not read; None for files of other kinds."""
    if found.is_pickle:
        return reason_of_pickle(found)
    if found.has(*OPENMOSS):
        kind = str(found.json(OPENMOSS[0]).get("sae_type"))
        return f"a {kind} of llamascopium, which {KINDS_OF_OPENMOSS[kind]}" if kind in KINDS_OF_OPENMOSS else None
    if found.has(*TEMPORAL):
        return "a temporal autoencoder, which is a model of sequences (attention over positions); load it with SAELens"
    return None


def reason_of_pickle(found: Found) -> str | None:
    state = found.pickle()
    if not isinstance(state, dict):
        return None
    if {"encoder_linear.weight", "decoder.weight", "decoder_bias"} <= state.keys():
        return (
            "Goodfire's top-k for gpt-oss, of which no source states whether decoder_bias is subtracted from the input "
            "and which way decoder.weight lies"
        )
    return None
