"""Files of Apollo's e2e_sae: samples_<n>.pt, with the autoencoders of many places in one file, and final_config.yaml.

Their names are those of the hooks, with hyphens for dots. The columns of decoder.weight are normalised when they are
used, so the stored norms mean nothing. Nothing is subtracted from the input.
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of
from sae_training.formats.loaded import Given, Loaded, place_and_text, precisions, sizes
from sae_training.formats.pickles import copied

CONFIG = "final_config.yaml"
NAMES = {"encoder.0.weight": "W_enc", "encoder.0.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
OF_A_PLACE = re.compile(rf"(?:saes\.)?([^.]+)\.({'|'.join(map(re.escape, NAMES))}|codebook)")
SAMPLES = re.compile(r"samples_(\d+)\.pt")


def recognises(found: Found) -> bool:
    file = file_of(found)
    content = found.pickle(file) if file else None
    return isinstance(content, dict) and bool(content) and all(OF_A_PLACE.fullmatch(str(name)) for name in content)


def file_of(found: Found) -> str | None:
    """The file, or the folder's file of the most samples."""
    if not found.is_folder:
        return found.path.name if found.is_pickle else None
    samples = [(int(matched[1]), name) for name in found.names if (matched := SAMPLES.fullmatch(name))]
    return max(samples)[1] if samples else None


def read(found: Found, given: Given) -> dict[str, Loaded]:
    """The autoencoders by hook. ValueError for codebooks, and for tensors that are missing."""
    file = file_of(found) or ""
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.pickle(file).items():
        if matched := OF_A_PLACE.fullmatch(name):
            places.setdefault(matched[1], {})[matched[2]] = tensor
    config = found.yaml(CONFIG) if CONFIG in found.names else {}
    name = config.get("tlens_model_name")
    model = name if isinstance(name, str) else None
    made = {}
    for place, state in places.items():
        where = f"{found.folder / file}: {place}"
        if "codebook" in state:
            raise ValueError(f"{where}: a codebook, which adds up the most similar vectors and has no activations.")
        missing = [name for name in NAMES if name not in state]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} missing; use another copy.")
        hook_point = place.replace("-", ".")
        made[hook_point] = read_place(state, hook_point, given, model)
    return made


def read_place(state: dict[str, Tensor], hook_point: str, given: Given, model: str | None) -> Loaded:
    d_sae, d_in = state["encoder.0.weight"].shape
    dtype = str(state["decoder.weight"].dtype).removeprefix("torch.")
    values = {
        "architecture": "standard",
        "apply_b_dec_to_input": False,
        "model_processing": "none",
        "file_format": "e2e_sae",
        **precisions(dtype),
    }
    place = place_and_text(given, model, hook_point, layer_of(hook_point))
    return Loaded(sizes(d_in, d_sae) | place | values, partial(weights, state))


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for theirs, name in NAMES.items():
        tensor = copied(state[theirs], transposed=name == "W_dec")
        ours[name] = tensor.T if name == "W_enc" else tensor
    ours["W_dec"].div_(ours["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-12))
    return ours
