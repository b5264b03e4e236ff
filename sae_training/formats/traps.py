"""What is easily got wrong about files of a family: told when they are inspected, from names, headers and configs.

What changes the result of loading is a remark of the family itself (`Loaded.remarks`). Here is what is read rightly
here, and wrongly by a reader who does not know it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sae_training.formats.found import Found
from sae_training.formats.loaded import Loaded

HALVES = ("bfloat16", "float16")


def traps(found: Found, loaded: Loaded) -> Iterator[str]:
    """A sentence for each known trap that these files have."""
    values = loaded.values
    file_format = str(values.get("file_format") or "")
    if values.get("file_dtype") in HALVES:
        yield (
            f"the weights are {values['file_dtype']} and are computed in float32 here; a program that computes in "
            f"{values['file_dtype']} gives other last digits, and other latents where two are close"
        )
    if is_square(values):
        yield "d_in equals d_sae, so shapes do not tell a matrix from its transpose; the format's own order is taken"
    for begins, of_family in OF_FAMILIES.items():
        if file_format.startswith(begins):
            yield from of_family(found, loaded)


def is_square(values: dict[str, Any]) -> bool:
    return (
        values.get("d_in") is not None
        and (values.get("n_latents") or values.get("expansion_factor"))
        in (
            1,
            values["d_in"],
        )
        and (values.get("n_latents") in (None, values["d_in"]))
    )


def of_saelens(found: Found, loaded: Loaded) -> Iterator[str]:
    cfg, values = found.json("cfg.json"), loaded.values
    shapes = found.header("sae_weights.safetensors").shapes
    architecture = cfg.get("architecture")
    if "W_skip" in shapes:
        yield "SAELens' HookedSAETransformer encodes and decodes without the skip connection, its forward has it"
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        yield (
            "a checkpoint of training: decoder norms are not folded and a single threshold is kept; SAELens loads it "
            "as a training autoencoder only"
        )
    if "activation_scaler.json" in found.names:
        yield "weights are in the units of scaled activations (activation_scaler.json), which SAELens' loader ignores"
    if "activation_whitening.safetensors" in found.names:
        yield "weights are in the units of whitened activations (activation_whitening.safetensors)"
    if "log_threshold" in shapes:
        yield "log_threshold in place of threshold: an early checkpoint, which SAELens' own loader does not read"
    if {"scaling_factor", "finetuning_scaling_factor"} & shapes.keys():
        yield "scaling factors multiply activations where they are decoded, and nowhere else"
    if values.get("activation_fn") == "tanh-relu":
        yield "activation_fn is tanh-relu, which SAELens 6 reads as relu"
    if "apply_b_dec_to_input" not in cfg and values.get("target_hook_point") is None:
        yield "apply_b_dec_to_input is not in cfg.json, and is True by SAELens' default"
    if architecture in ("topk", "abstopk") and not cfg.get("rescale_acts_by_decoder_norm"):
        yield "the k largest are chosen by pre-activations as they are: folding decoder norms would choose others"
    if values.get("architecture") == "abstopk":
        yield "activations may be negative: the k largest by size are kept with their signs"
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else cfg
    stated = str((metadata or {}).get("hook_name") or "")
    if stated and stated != values.get("hook_point"):
        yield f"the place is {stated} there, a module of transformers, and {values.get('hook_point')} here"
    if values.get("model_processing") == "default":
        yield "the model's weights were processed (folded and centred); the plain model gives other activations"
    if "trainer_state.pt" in found.names:
        yield "trainer_state.pt is a pickle, and is never opened"


def of_sparsify(found: Found, loaded: Loaded) -> Iterator[str]:
    cfg, values = found.json("cfg.json"), loaded.values
    if cfg.get("normalize_decoder"):
        yield "normalize_decoder does not say that decoder rows have unit norm: averaged weights are saved"
    if cfg.get("signed"):
        yield "signed: the k largest by size are kept with their signs, so that activations may be negative"
    if not cfg.get("num_latents"):
        yield "num_latents is 0 or missing, which stands for d_in * expansion_factor; other loaders take it literally"
    if str(values.get("hook_point", "")).endswith("hook_resid_pre"):
        yield "a folder named layer_N is the input of block N; layers.N is its output"
    if not values.get("target_hook_point"):
        yield "W_dec lies as encoder.weight does, (d_sae, d_in); SAELens' loader transposes it"
    yield "on a GPU sparsify's own forward runs under bfloat16 autocast; here it is float32"


def of_dictionary_learning(found: Found, loaded: Loaded) -> Iterator[str]:
    name = str(loaded.values["file_format"]).rpartition(" ")[2]
    file = "ae.pt" if found.is_folder else found.path.name
    content = found.pickle(file)
    is_backup = isinstance(content, dict) and {"ae", "optimizer"} <= content.keys()
    state = content["ae"] if is_backup else content
    if is_backup:
        yield "a backup of training: its biases and thresholds are multiplied by norm_factor here, as at the end there"
    if name == "AutoEncoderNew":
        yield "nothing is subtracted from the input; qresearch's files have the same tensors"
    if name == "JumpReluAutoEncoder":
        yield "b_dec is not subtracted: apply_b_dec_to_input is an attribute there that files do not hold"
    if name == "AutoEncoderTopK" and "threshold" in state:
        yield "a threshold is stored, and not used: the k largest of each row are active"
    if name == "MatryoshkaBatchTopKSAE":
        yield "all groups are active"
    hook_point = str(loaded.values.get("hook_point", ""))
    if name != "AutoEncoderNew" and hook_point.startswith("blocks.") and not hook_point.endswith("hook_resid_post"):
        yield f"SAELens' loader takes every place for hook_resid_post; these files are of {hook_point}"


def of_several_places(found: Found, loaded: Loaded) -> Iterator[str]:
    file_format = str(loaded.values["file_format"])
    if file_format == "gemma_scope 2 clt":
        yield "circuit-tracer's own loader of these files counts one layer too few, and fails"
    if file_format == "circuit_tracer clt":
        yield "slot j of W_dec_i is for layer i + j; Gemma Scope's files have a slot for every layer"
        yield "circuit-tracer loads bfloat16 unless it is told otherwise, and leaves position 0 out of its graphs"
    if file_format == "llamascopium clt":
        yield "W_D.i is of the target layer i, with a row for each source up to it; circuit-tracer counts sources"
    if file_format == "llamascopium crosscoder":
        yield "each place has activations of its own: its decoder norms decide there which latents are active"
        yield "fold_activation_scale there changes the function of a crosscoder; here the scales are folded exactly"
    if file_format.startswith("llamascopium") and found.json("config.json").get("norm_activation") == "inference":
        yield "dataset_average_activation_norm is not used: norm_activation is inference, and its values may be chance"
    if file_format.startswith("crosscoder_learning BatchTopK"):
        yield "the threshold is compared with activations times decoder norms, and decode takes them without"


def of_mats(found: Found, loaded: Loaded) -> Iterator[str]:
    yield "trained on a processed model (folded and centred weights); the plain model gives other activations"
    yield "a pickle: read without executing anything in it; save it again with save_model"


def of_llama_scope(found: Found, loaded: Loaded) -> Iterator[str]:
    values = loaded.values
    if values["file_format"] == "llama_scope 2024":
        yield (
            "activations are in other units than SAELens' and Neuronpedia's, which leave the norms of decoder rows out "
            "and so apply the threshold to other numbers, unless the rows have norm 1 (inspect with --full)"
        )
    elif values["architecture"] == "jumprelu":
        yield "thresholds are for pre-activations times the norms of decoder rows, which SAELens' loader leaves out"


def of_llamascopium(found: Found, loaded: Loaded) -> Iterator[str]:
    folder = found if found.is_folder else Found(found.folder)
    config = folder.json("config.json") if "config.json" in folder.names else {}
    if config.get("norm_activation") == "inference" and loaded.values["architecture"] == "jumprelu":
        yield (
            "norm_activation is inference: llamascopium folded a norm into the weights and not into the thresholds, so "
            "that other latents are active than in training; an unfolded copy is better"
        )
    if loaded.values["architecture"] == "normtopk":
        yield "the k largest are chosen by pre-activations times the norms of decoder rows"


OF_FAMILIES = {
    "saelens": of_saelens,
    "llama_scope": of_llama_scope,
    "llamascopium": of_llamascopium,
    "sparsify": of_sparsify,
    "dictionary_learning": of_dictionary_learning,
    "mats": of_mats,
    "gemma_scope 2 c": of_several_places,
    "circuit_tracer clt": of_several_places,
    "llamascopium c": of_several_places,
    "crosscoder_learning": of_several_places,
}
