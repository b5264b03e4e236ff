"""Loads the frozen language model: weights, precision and tokenizer, and what identifies it.

`HookedTransformer` serves the names that TransformerLens lists, with its usual weight processing, because autoencoders
of the mats era expect it. Every other model, local folders included, is a `TransformerBridge` in compatibility mode,
which processes the weights in the same way. TransformerLens 4 has the bridge only. `model_processing` "none" leaves the
weights as they are: `from_pretrained_no_processing`, or the bridge without compatibility mode. The rest of the package
uses what both classes share: the forward with `stop_at_layer`, `hook_dict`, `run_with_hooks`, `tokenizer`, `cfg`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from sae_training.config.io import with_defaults
from sae_training.config.placement import DeviceMap
from sae_training.demo_data import bundled_model
from sae_training.language_model.model_parts import ModelParts
from sae_training.language_model.placed import Placement, is_in_8_bits
from sae_training.language_model.tokenizer import for_bridge, give_back, read_tokenizer
from sae_training.language_model.twins import skip_hook_points
from sae_training.machine.device import checked
from sae_training.machine.errors import first_line
from sae_training.machine.files import NotEnoughDisk, disk_named
from sae_training.machine.precision import bfloat16_is_fast
from sae_training.parallel.ranks import own_device

PLAIN_TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."

LanguageModel = Any  # HookedTransformer or TransformerBridge: they share methods, not a base class

# ----------------------------------------------------------------------------------------------------------- loading


def load_language_model(
    name: str,
    device: str = "cpu",
    lm_dtype: str = "auto",
    model_processing: str = "default",
    hook_points: Sequence[str] = (),
    device_map: DeviceMap | None = None,
    load_in_8bit: bool = False,
) -> LanguageModel:
    """Load a frozen language model, ready for `read_hooks` and for all that TransformerLens does with it.

    `name` is a TransformerLens name, a local folder in Hugging Face layout, a Hugging Face name, or "demo" for the
    bundled model. The weights are processed (LayerNorm folded, writing weights centred) in float32 and only then cast,
    because folding in bfloat16 moves the activations by 1%. In models with LayerNorm (GPT-2, Pythia) the rows of the
    residual stream are then those of transformers' `output_hidden_states` minus their mean; in models with RMSNorm
    (Llama, SmolLM2) they are the same. With `model_processing` "none" they are the same in all. Where only a bridge has
    one of `hook_points`, such as the input of an MLP, it is a bridge.

    So it is with a `device_map`, which puts parts of it on several devices, or with `load_in_8bit`; both are those of
    transformers, with `model_processing` "none" only.

    Raise FileNotFoundError if there is no such model, and ValueError if its tokenizer is another model's.
    """
    checked(device)
    dtype = language_model_dtype(lm_dtype, device)
    place = Placement(device, device_map, load_in_8bit, dtype)
    place.check(model_processing)
    source = bundled_model(name)
    hooked = hooked_transformer_class()
    processed = model_processing == "default"
    load: Callable[..., LanguageModel] = partial(boot_bridge, processed=processed, place=place)
    if (
        hooked is not None
        and place.is_plain
        and official_name(source) is not None
        and not any(map(only_in_bridges, hook_points))
    ):
        load = hooked.from_pretrained if processed else hooked.from_pretrained_no_processing
    with quiet_loading():
        model = load_by_name(load, source, own_device(device))
        if not load_in_8bit:  # whose weights have no other precision
            cast_weights(model, dtype)
    model.eval()
    model.requires_grad_(False)
    check_tokenizer_fits(model.tokenizer, model.cfg.d_vocab, name)
    return model


def model_of(cfg: Any, model: LanguageModel | None = None, device: str | None = None) -> LanguageModel:
    """Return the language model that a config names, on its device or another, or `model`, which stands in for it."""
    cfg = with_defaults(cfg)  # notebooks of the mats era have configs of their own
    if model is not None:
        check_processing(model, cfg.model_processing)
        check_8_bits(model, cfg.load_in_8bit)
        return model
    named = (cfg.hook_point, cfg.target_hook_point or ())
    hook_points = [hook for value in named for hook in ([value] if isinstance(value, str) else value)]
    return load_language_model(
        cfg.model_name,
        device or str(cfg.device),
        cfg.lm_dtype,
        cfg.model_processing,
        hook_points,
        cfg.device_map,
        cfg.load_in_8bit,
    )


def only_in_bridges(hook_point: str) -> bool:
    """Return whether HookedTransformer has no such hook: the inputs and outputs of modules, blocks.0.mlp.hook_in."""
    return hook_point.rpartition(".")[2] in ("hook_in", "hook_out")


def language_model_dtype(lm_dtype: str, device: str) -> torch.dtype:
    """The precision to run the language model in; "auto" is bfloat16 where the hardware multiplies in it."""
    if lm_dtype != "auto":
        return getattr(torch, lm_dtype)
    return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32


def hooked_transformer_class() -> Any | None:
    """HookedTransformer; None in TransformerLens 4, which has removed it."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def official_name(name: str) -> str | None:
    """The Hugging Face name of a model that TransformerLens lists by this name or alias; None if it lists none."""
    for official in OFFICIAL_MODEL_NAMES:
        if name.lower() in (known.lower() for known in (official, *MODEL_ALIASES.get(official, ()))):
            return official
    return None


def boot_bridge(name: str, device: str, processed: bool = True, place: Placement | None = None) -> TransformerBridge:
    place = place or Placement(device)
    name = official_name(name) or name
    config = AutoConfig.from_pretrained(name)
    if (getattr(config, "pad_token_id", None) or 0) >= getattr(config, "vocab_size", math.inf):
        config.pad_token_id = None  # because torch makes no table of embeddings with a padding token that is not in it
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, output_loading_info=True, **place.arguments()
        )
    except ValueError as error:
        raise place.explained(error) from error
    hf_model, info = loaded
    check_weights(name, sorted(info["missing_keys"]))
    if place.is_plain:
        hf_model.to(device)  # because the bridge leaves a model that it is given where it is
    place.check_in_reach(hf_model)
    return bridge_of(hf_model, name, processed)


def bridge_of(hf_model: Any, name: str, processed: bool) -> TransformerBridge:
    """Make the bridge of a model of transformers, where it lies and in the precision that it has."""
    tokenizer = read_tokenizer(name)
    model = TransformerBridge.boot_transformers(
        name,
        hf_model=hf_model,
        tokenizer=for_bridge(tokenizer),
        device=str(next(hf_model.parameters()).device),
        dtype=hf_model.dtype,
    )
    if processed:
        model.enable_compatibility_mode(disable_warnings=True)
    model.eval()
    give_back(model, tokenizer)
    skip_hook_points(model)
    return model


def check_processing(model: LanguageModel, model_processing: str) -> None:
    """Warn if a model that the caller gives was processed otherwise than the config says, which a later load obeys."""
    found = is_processed(model)
    if found is not None and found != (model_processing == "default"):
        wanted = "default" if found else "none"
        warnings.warn(
            f"model_processing: found {model_processing!r} with a model whose weights TransformerLens has "
            f"{'' if found else 'not '}processed; set it to {wanted!r}, so that it is loaded in the same way later",
            stacklevel=3,
        )


def check_8_bits(model: LanguageModel, load_in_8bit: bool) -> None:
    """Warn if a model that the caller gives has weights of another kind than the config says, as `check_processing`."""
    if (found := is_in_8_bits(model)) != load_in_8bit:
        warnings.warn(
            f"load_in_8bit: found {load_in_8bit} with a model whose weights are {'' if found else 'not '}in 8 bits; "
            f"set it to {found}, so that it is loaded in the same way later",
            stacklevel=3,
        )


def is_processed(model: LanguageModel) -> bool | None:
    """Return whether TransformerLens has processed the weights; None if that cannot be told."""
    if hasattr(model, "original_model"):
        return getattr(model, "_weights_processed", None)
    if getattr(model.cfg, "original_architecture", None) is None:  # made by hand, of no model that could be loaded
        return None
    return str(model.cfg.normalization_type).endswith("Pre")  # what folding makes of LN and RMS


def check_weights(name: str, missing: list[str]) -> None:
    """Raise ValueError for weights that the files lack, because transformers makes up random ones for them."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"model_name: the files of {name!r} lack the weights {missing[0]}{more}, for which transformers makes up "
            "random numbers; expected all weights of the language model, its unembedding included; save it with "
            "AutoModelForCausalLM."
        )


def cast_weights(model: LanguageModel, dtype: torch.dtype) -> None:
    """Cast all weights, those included that the bridge holds as plain attributes, where `.to()` does not find them.

    Most of these (the processed MLP weights) are views of parameters, and stay views: nothing is held twice.
    Frequencies of rotary positions stay as they are, as transformers keeps them: rounded to bfloat16, they turn the
    1,000th position by up to a radian too much or too little.
    """
    frequencies = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    parameters = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    plain = [
        (module, name, value, parameters.get(value.untyped_storage().data_ptr()))
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    model.to(dtype, print_details=False)
    model.cfg.dtype = dtype
    for module, name, value, parameter in plain:
        view = (value.shape, value.stride(), value.storage_offset())
        setattr(module, name, value.to(dtype) if parameter is None else parameter.data.as_strided(*view))
    for module, name, buffer in frequencies:
        setattr(module, name, buffer)


def load_by_name(load: Callable[..., LanguageModel], name: str, device: str) -> LanguageModel:
    """`load(name, device=device)`, with errors that say what `name` can be."""
    path = Path(name).expanduser()
    if not path.exists() and name.startswith((".", "~", os.sep)):
        raise FileNotFoundError(f"model_name: there is no folder {name}; check the path.")
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model_name: {name} is a path, but holds no config.json; expected a folder in Hugging Face layout "
            "(config.json, model.safetensors, tokenizer.json)."
        )
    try:
        with disk_named(Path(HF_HUB_CACHE)):
            return load(name, device=device)
    except NotEnoughDisk:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"model_name: could not load {name!r}. It is not a folder on this machine, and the Hugging Face hub gave: "
            f"{first_line(error)}. Give a TransformerLens name, a Hugging Face name (with network access or a filled "
            'cache), a local folder, or "demo".'
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the warnings and progress bars of other libraries off the screen while a model loads."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        if had_bars:
            transformers_logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model that `load_language_model` loads by this name, without the model."""
    source = bundled_model(name)
    try:
        with disk_named(Path(HF_HUB_CACHE)):
            tokenizer = read_tokenizer(official_name(source) or source)
    except NotEnoughDisk:
        raise
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model_name: {source!r} has no tokenizer here, nor on the hub: {first_line(error)}"
        ) from error
    if tokenizer is None:
        raise FileNotFoundError(
            f"model_name: {source!r} holds no tokenizer files, expected tokenizer.json or another vocabulary; save the "
            "model's tokenizer there with tokenizer.save_pretrained."
        )
    return tokenizer


def check_tokenizer_fits(tokenizer: Any, d_vocab: int, name: str) -> None:
    """Raise ValueError if the model has no ids for most of a plain text, so that the tokenizer is another model's.

    Single ids that it lacks, such as that of an added padding token, do no harm while they do not occur. In a text they
    are refused where the text is read.
    """
    ids: list[int] = []
    if tokenizer is not None:
        with suppress(Exception):  # because a tokenizer of chess moves knows no letters, and need not
            ids = tokenizer(PLAIN_TEXT, add_special_tokens=False)["input_ids"]
    if tokenizer is not None and 2 * sum(i >= d_vocab for i in ids) > len(ids):
        raise ValueError(
            f"model_name: the tokenizer of {name!r} has token ids up to {max(tokenizer.get_vocab().values())}, but the "
            f"model knows only {d_vocab} tokens (ids up to {d_vocab - 1}), too few for a plain text; use the tokenizer "
            "the model was trained with."
        )


# ---------------------------------------------------------------------------------------------------------- identity


def fingerprint(model: LanguageModel) -> str:
    """A hash of 64 evenly spaced values of every parameter, which tells apart two language models of one name.

    It does not depend on parameter names and order, which change between library versions.
    """
    if isinstance(model, ModelParts):
        return model.fingerprint
    digests: set[bytes] = set()
    for parameter in model.parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)][:64].float().cpu()
        digests.add(hashlib.sha256(repr(tuple(parameter.shape)).encode() + sample.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def revision(model: LanguageModel) -> str | None:
    """The commit of the model on the Hugging Face hub; None if it comes from elsewhere, or the commit is unknown."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "_commit_hash", None)
