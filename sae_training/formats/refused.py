"""Files that are recognised and not read, with the reason: no dictionaries of vectors, or rules unknown.

Codebooks are refused by the family that they belong to, and pickled objects of other programs' classes by `pickles`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from sae_training.formats.found import Found
from sae_training.formats.loaded import Given, Loaded

OPENMOSS = ("config.json", "sae_weights.safetensors")
LIST = "config.yaml"
TEMPORAL = ("conf.yaml", "latest_ckpt.safetensors")

KINDS_OF_OPENMOSS = {
    "lorsa": "is sparse attention over positions, not a dictionary of vectors",
    "molt": "adds up transforms of low rank, not a dictionary of vectors",
}


def recognises(found: Found) -> bool:
    return what_it_is(found) is not None


def kind_of(found: Found) -> str | None:
    """The name of what the files are; None for files of other kinds."""
    told = what_it_is(found)
    return None if told is None else told[0]


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """ValueError with the reason."""
    _, reason = what_it_is(found) or ("", "not of this kind")
    raise ValueError(f"{found.path}: {reason}.")


def what_it_is(found: Found) -> tuple[str, str] | None:
    """What the files are, as a name and as a sentence with why they are not read; None for files of other kinds."""
    if found.is_pickle:
        return of_pickle(found)
    if found.has(*OPENMOSS):
        kind = str(found.json(OPENMOSS[0]).get("sae_type"))
        if kind not in KINDS_OF_OPENMOSS:
            return None
        return f"llamascopium {kind}", f"a {kind} of llamascopium, which {KINDS_OF_OPENMOSS[kind]}"
    if found.is_folder and LIST in found.names and (places := elsewhere(found)):
        return "circuit_tracer list", (
            f"{LIST} is a list of circuit-tracer's transcoders that lie elsewhere ({', '.join(places[:3])}, "
            f"{len(places)} in all), and there are no weights here; download one of these and give its path"
        )
    if found.has(*TEMPORAL):
        reason = "a temporal autoencoder, a model of sequences (attention over positions); load it with SAELens"
        return "temporal", reason
    return None


def of_pickle(found: Found) -> tuple[str, str] | None:
    state = found.pickle()
    if not isinstance(state, dict):
        return None
    if {"encoder_linear.weight", "decoder.weight", "decoder_bias"} <= state.keys():
        return "goodfire top-k", (
            "Goodfire's top-k for gpt-oss, of which no source states whether decoder_bias is subtracted from the input "
            "and which way decoder.weight lies"
        )
    return None


def elsewhere(found: Found) -> list[str]:
    """The files that circuit-tracer's config lists; [] of other configs, and where there is more than the list."""
    if any(path.is_dir() or path.suffix in (".npz", ".safetensors") for path in found.folder.iterdir()):
        return []
    listed: Any = None
    with contextlib.suppress(ValueError, OSError):
        listed = found.yaml(LIST).get("transcoders")
    if not isinstance(listed, list):
        return []
    return [str(part.get("id") or part.get("filepath")) if isinstance(part, dict) else str(part) for part in listed]
