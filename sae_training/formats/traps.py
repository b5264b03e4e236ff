"""What is easily got wrong about files of a family: told when they are inspected, from names, headers and configs.

What changes the result of loading is a remark of the family itself (`Loaded.remarks`). Here is what is read rightly
here, and wrongly by a reader who does not know it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sae_training.config.types import MAY_BE_NEGATIVE
from sae_training.formats import dictionary_learning
from sae_training.formats.found import Found
from sae_training.formats.loaded import Loaded

HALVES = ("bfloat16", "float16")
ALL_HEADS = "the input is hook_z with all heads side by side (n_heads * d_head), before the attention's output matrix"
AFTER_NORM = "hook_mlp_out is after Gemma's post-MLP norm; transformers' mlp gives what is before it"


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
    if values.get("model_processing") == "default" and not file_format.startswith("mats"):
        yield "the model's weights were processed (folded and centred); the plain model gives other activations"
    for begins, of_family in OF_FAMILIES.items():
        if file_format.startswith(begins):
            yield from of_family(found, loaded)


def is_square(values: dict[str, Any]) -> bool:
    d_in = values.get("d_in")
    d_sae = values.get("d_sae") or values.get("n_latents") or (d_in or 0) * values.get("expansion_factor", 1)
    return d_in is not None and d_sae == d_in


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
    if architecture not in ("topk", "abstopk", "matching_pursuit") and values.get("target_hook_point") is None:
        yield "Neuronpedia shows activations times the norms of decoder rows, these are without (--full has the norms)"
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
    if cfg.get("transcode") and not {"activation", "skip_connection"} & cfg.keys():
        yield "transcoders of before February 2025 subtracted b_dec from their input; here it is not, as since then"
    if not values.get("target_hook_point"):
        yield "W_dec lies as encoder.weight does, (d_sae, d_in); SAELens' loader transposes it"
    yield "on a GPU sparsify's own forward runs under bfloat16 autocast; here it is float32"


def of_dictionary_learning(found: Found, loaded: Loaded) -> Iterator[str]:
    name = str(loaded.values["file_format"]).rpartition(" ")[2]
    file = dictionary_learning.file_of(found) or ""
    state = dictionary_learning.state_at(found, file)
    if dictionary_learning.is_backup(dictionary_learning.content_of(found, file)):
        yield "a backup of training: its biases and thresholds are multiplied by norm_factor here, as at the end there"
    if name == "AutoEncoder":
        yield "decoder rows may have any norm (the April update trains so): then only activations times norms compare"
    if name == "BatchTopKSAE":
        yield "what is above the threshold is active, in any number; k was an average of training"
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
    if file_format.startswith("gemma_scope 2 c"):
        yield "i of params_layer_<i> counts the places, and is no layer's number; w_dec has a slot for every place"
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
    if file_format.startswith("llamascopium"):
        yield from of_folded_places(found, loaded)
    if file_format.startswith("crosscoder_learning BatchTopK"):
        yield "the threshold is compared with activations times decoder norms, and decode takes them without"


def of_folded_places(found: Found, loaded: Loaded) -> Iterator[str]:
    """Of a crosscoder of llamascopium whose norms are in its weights."""
    config, file_format = found.json("config.json"), str(loaded.values["file_format"])
    is_inference = config.get("norm_activation") == "inference"
    if is_inference:
        yield "dataset_average_activation_norm is not used: norm_activation is inference, and its values may be chance"
    if not is_inference and not loaded.takes_norm_factor:
        return
    if file_format == "llamascopium crosscoder":
        yield "norms are folded into the biases and not into the matrices: another function than in training"
    elif loaded.values["activation"] != "relu" and config.get("sparsity_include_decoder_norm", True):
        yield (
            "norms are folded into the weights, which changes the decoder norms that decide which latents are active: "
            "others than in training"
        )


def of_gemma_scope_1(found: Found, loaded: Loaded) -> Iterator[str]:
    hook_point = str(loaded.values.get("hook_point", ""))
    yield "nothing is subtracted from the input, and a latent is active strictly above its threshold"
    if hook_point == "hook_embed":
        yield (
            "trained on embeddings without Gemma's factor sqrt(d_in), which is folded here, b_dec included; SAELens "
            "leaves b_dec as it is"
        )
    if hook_point.endswith("attn.hook_z"):
        yield ALL_HEADS
    if hook_point.endswith("hook_mlp_out"):
        yield AFTER_NORM
    if loaded.values.get("target_hook_point"):
        yield "only the path tells a transcoder of these files from an autoencoder, which has the same tensors"
        yield (
            "the transcoder's input is ln2.hook_normalized without the norm's gain, as TransformerLens has it if it "
            "folds the norms; the output is after Gemma's norm"
        )


def of_gemma_scope_2(found: Found, loaded: Loaded) -> Iterator[str]:
    if loaded.is_crosscoder:
        return
    hook_point = str(loaded.values.get("hook_point", ""))
    yield "nothing is subtracted from the input, and a latent is active strictly above its threshold"
    if hook_point.endswith("attn.hook_z"):
        yield ALL_HEADS
    if hook_point.endswith("hook_mlp_out"):
        yield AFTER_NORM
    if loaded.values.get("target_hook_point"):
        yield (
            "the transcoder's input is after the norm with its gain (mlp.hook_in), unlike Gemma Scope 1's; the output "
            "is after Gemma's norm"
        )
    if loaded.values.get("skip_connection"):
        yield "affine_skip_connection is (d_in, d_out), x @ it; SAELens' and circuit-tracer's W_skip is transposed"


def of_circuit_tracer(found: Found, loaded: Loaded) -> Iterator[str]:
    if loaded.is_crosscoder:
        return
    yield "W_enc is (d_sae, d_in), a latent a row, and SAELens' is (d_in, d_sae); nothing is subtracted from the input"
    yield "circuit-tracer leaves position 0 out of its graphs; here the first token has activations too"
    yield "the model's norms must not be folded: with TransformerLens' processing the input is another"
    if loaded.values.get("skip_connection"):
        yield "W_skip is (d_out, d_in), applied as x @ W_skip.T; of a cross-layer transcoder it is not transposed"


def of_openai(found: Found, loaded: Loaded) -> Iterator[str]:
    if loaded.values.get("architecture") in MAY_BE_NEGATIVE:
        yield "Identity in place of ReLU: activations may be below 0"
    if "k" not in loaded.values:
        yield "the input is used as it is: only TopK files (version 5) normalise rows"
    else:
        yield (
            "rows are normalised by their mean and the deviation of a sample (d_in - 1), with 1e-5 added to it that is "
            "left out on the way back; layer norms of torch have another deviation"
        )
    yield "the file's name is a layer alone: place and width are names of the folders above it"
    if "decoder.linear.weight" in found.pickle():
        yield "tied weights: decoder.linear.weight is the encoder's matrix, (d_sae, d_in)"


def of_e2e_sae(found: Found, loaded: Loaded) -> Iterator[str]:
    yield "decoder columns are normalised when they are used, so stored norms mean nothing; here the rows have norm 1"
    yield "nothing is subtracted from the input"


def of_single_file(found: Found, loaded: Loaded) -> Iterator[str]:
    match loaded.values.get("file_format"):
        case "qwen_scope":
            yield "W_enc is (d_sae, d_in) and W_dec (d_in, d_sae): both the other way than their names mean elsewhere"
            yield "nothing is subtracted from the input, and of the k largest those below 0 are no activations"
            yield "k is in the repository's name alone (L0_<k>)"
        case "goodfire":
            yield "a ReLU, which some take for top-k; nothing is subtracted from the input"
            yield "decoder rows may have any norm: only activations times norms compare (inspect with --full)"
        case "attention_saes":
            yield ALL_HEADS


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
    norm = config.get("norm_activation", "dataset-wise")
    if loaded.values["architecture"] == "jumprelu" and (norm == "inference" or loaded.takes_norm_factor):
        yield (
            "norm_activation is inference, or norm_factor is given, so a norm is in the weights: llamascopium folds it "
            "into the pre-activations and not into the thresholds that these are compared with, so that other latents "
            "are active than in training; it is read as its own loader does, and an unfolded copy is better"
        )
    elif loaded.values["architecture"] == "jumprelu" and norm == "dataset-wise":
        yield (
            "llamascopium's analyses load it with fold_activation_scale=True, which scales pre-activations and not the "
            "thresholds that these are compared with: other latents are active there than in training, and here"
        )
    if loaded.values["architecture"] == "normtopk":
        yield "the k largest are chosen by pre-activations times the norms of decoder rows"


OF_FAMILIES = {
    "gemma_scope 1": of_gemma_scope_1,
    "gemma_scope 2": of_gemma_scope_2,
    "circuit_tracer": of_circuit_tracer,
    "openai": of_openai,
    "e2e_sae": of_e2e_sae,
    "qwen_scope": of_single_file,
    "goodfire": of_single_file,
    "attention_saes": of_single_file,
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
