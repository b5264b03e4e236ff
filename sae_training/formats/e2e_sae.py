"""Files of Apollo's e2e_sae: samples_<n>.pt, with the autoencoders of many places in one file, and final_config.yaml.

Their names are those of the hooks, with hyphens for dots. The columns of decoder.weight are normalised when they are
used, so the stored norms mean nothing. Nothing is subtracted from the input. The model is TransformerLens' own form of
`tlens_model_name` (load_tlens_model), with folded and centred weights, or one from `tlens_model_path`, as it stands.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor

from sae_training.formats.found import Found
from sae_training.formats.hook_names import layer_of
from sae_training.formats.loaded import Given, Loaded, fitting_batch, place_and_text, precisions, sizes
from sae_training.formats.pickles import copied

CONFIG = "final_config.yaml"
NAMES = {"encoder.0.weight": "W_enc", "encoder.0.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
OF_A_PLACE = re.compile(rf"(?:saes\.)?([^.]+)\.({'|'.join(map(re.escape, NAMES))}|codebook)")
MODEL_UNKNOWN = (
    f"no {CONFIG} that names the model: model_processing is taken to be default, as for every model that is loaded by "
    "name there; for one from a file (tlens_model_path) it would be none"
)
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
    model = model_and_text(config, given)
    remarks = () if config.keys() & {"tlens_model_name", "tlens_model_path"} else (MODEL_UNKNOWN,)
    made = {}
    for place, state in places.items():
        where = f"{found.folder / file}: {place}"
        if "codebook" in state:
            raise ValueError(f"{where}: a codebook, which adds up the most similar vectors and has no activations.")
        missing = [name for name in NAMES if name not in state]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} missing; use another copy.")
        hook_point = place.replace("-", ".")
        made[hook_point] = read_place(state, hook_point, given, model, remarks)
    return made


def model_and_text(config: dict[str, Any], given: Given) -> dict[str, Any]:
    """The fields that final_config.yaml gives: the model, its form, and the text (`train_data`)."""
    name, data = config.get("tlens_model_name"), config.get("train_data")
    data = data if isinstance(data, dict) else {}
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    values = place_and_text(given, name if isinstance(name, str) else None, dataset_path=texts.get("dataset_name"))
    values["model_processing"] = "none" if name is None and config.get("tlens_model_path") is not None else "default"
    if texts.get("n_ctx", "").isdecimal():
        values |= fitting_batch(max(2, int(texts["n_ctx"])))
    if "dataset_name" in texts and given.dataset_path is None:
        values["is_dataset_tokenized"] = texts.get("is_tokenized", "true").lower() == "true"
        values["dataset_text_column"] = texts.get("column_name", "input_ids")
        values |= {"dataset_split": texts["split"]} if "split" in texts else {}
    return values


def read_place(
    state: dict[str, Tensor], hook_point: str, given: Given, model: dict[str, Any], remarks: tuple[str, ...]
) -> Loaded:
    d_sae, d_in = state["encoder.0.weight"].shape
    dtype = str(state["decoder.weight"].dtype).removeprefix("torch.")
    values = {
        "architecture": "standard",
        "apply_b_dec_to_input": False,
        "file_format": "e2e_sae",
        **precisions(dtype),
    }
    place = {"hook_point": hook_point, "hook_point_layer": layer_of(hook_point) or 0}
    return Loaded(sizes(d_in, d_sae) | model | place | values, partial(weights, state), remarks)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for theirs, name in NAMES.items():
        tensor = copied(state[theirs], transposed=name == "W_dec")
        ours[name] = tensor.T if name == "W_enc" else tensor
    ours["W_dec"].div_(ours["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-12))
    return ours
