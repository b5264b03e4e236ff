"""Loading the frozen language model, and finding the place in it that an autoencoder reads.

The only file that imports transformer_lens. `HookedTransformer` serves the names it knows (with its usual weight
processing, as SAEs of the mats era expect); every other model, local folders included, is a `TransformerBridge` in
compatibility mode, which processes the weights in the same way. All later code uses only what both have:
the forward with `stop_at_layer`, `hook_dict`, `run_with_hooks`, `tokenizer`, `cfg`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_training.demo_data import bundled_model
from sae_training.language_model.twins import skip_hook_points
from sae_training.machine.paths import first_line
from sae_training.machine.precision import bfloat16_is_fast

LanguageModel = Any  # HookedTransformer or TransformerBridge: they share methods, not a base class

# ----------------------------------------------------------------------------------------------------------- loading


def load_language_model(name: str, device: str = "cpu", lm_dtype: str = "auto") -> LanguageModel:
    """Load a frozen language model, ready for `read_hooks` and all that transformer_lens does with it.

    `name` is a TransformerLens name, a local folder in Hugging Face layout, a Hugging Face name, or "demo" for the
    model that comes with this package. The weights are processed (LayerNorm folded, writing weights centred) in
    float32 and only then cast, because folding in bfloat16 moves the activations by 1%.
    """
    dtype = language_model_dtype(lm_dtype, device)
    source = bundled_model(name)
    with quiet_loading():
        hooked = hooked_transformer_class(source)
        if hooked is not None:
            model = load_by_name(hooked.from_pretrained, source, device)
        else:
            model = load_by_name(boot_bridge, source, device)
        cast_weights(model, dtype)
    model.eval()
    model.requires_grad_(False)
    check_tokenizer_fits(model, name)
    return model


def language_model_dtype(lm_dtype: str, device: str) -> torch.dtype:
    """The precision to run the language model in; "auto" is bfloat16 where the hardware multiplies in it."""
    if lm_dtype != "auto":
        return getattr(torch, lm_dtype)
    return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32


def hooked_transformer_class(name: str) -> Any | None:
    """HookedTransformer if this transformer_lens has it (4.x does not) and it knows `name`, else None."""
    try:
        from transformer_lens import HookedTransformer
        from transformer_lens.loading_from_pretrained import get_official_model_name
    except ImportError:
        return None
    try:
        get_official_model_name(name)
    except ValueError:
        return None
    return HookedTransformer


def boot_bridge(name: str, device: str) -> TransformerBridge:
    hf_model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=torch.float32
    )
    model.enable_compatibility_mode(disable_warnings=True)
    model.eval()
    skip_hook_points(model)
    return model


def cast_weights(model: LanguageModel, dtype: torch.dtype) -> None:
    # The bridge keeps processed MLP weights as plain attributes too, which .to() does not reach: views of parameters,
    # and so they stay.
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


def load_by_name(load: Any, name: str, device: str) -> LanguageModel:
    path = Path(name).expanduser()
    if not path.exists() and name.startswith((".", "~", os.sep)):
        raise FileNotFoundError(f"model_name: there is no folder {name}; check the path.")
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model_name: {name} is a path, but holds no config.json; expected a folder in Hugging Face layout "
            "(config.json, model.safetensors, tokenizer.json)."
        )
    try:
        return load(name, device=device)
    except OSError as error:
        raise FileNotFoundError(
            f"model_name: could not load {name!r}. It is not a folder on this machine, and the Hugging Face hub gave: "
            f"{first_line(error)}. Give a TransformerLens name, a Hugging Face name (with network access or a filled "
            'cache), a local folder, or "demo".'
        ) from error


@contextmanager
def quiet_loading():
    """No deprecation notices and progress bars of other libraries on the user's screen while a model loads."""
    from transformers.utils import logging as transformers_logging

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


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that `load_language_model` knows by this name, without the model."""
    name = bundled_model(name)
    with suppress(ValueError):  # not one of TransformerLens' own names
        name = get_official_model_name(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model_name: {name!r} has no tokenizer here, nor on the hub: {error}") from error


def check_tokenizer_fits(model: LanguageModel, name: str) -> None:
    if model.tokenizer is None:
        return
    highest = max(model.tokenizer.get_vocab().values())
    if highest >= model.cfg.d_vocab:
        raise ValueError(
            f"model_name: the tokenizer of {name!r} has token ids up to {highest}, but the model knows only "
            f"{model.cfg.d_vocab} tokens (ids up to {model.cfg.d_vocab - 1}); use the tokenizer the model was "
            "trained with."
        )


def fingerprint(model: LanguageModel) -> str:
    """A hash of 64 evenly spaced values of every parameter: tells two language models of one name apart.

    Whatever the parameters are called, and in whatever order they come: that changes with versions of libraries.
    """
    digests: set[bytes] = set()
    for parameter in model.parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)][:64].float().cpu()
        digests.add(hashlib.sha256(repr(tuple(parameter.shape)).encode() + sample.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def revision(model: LanguageModel) -> str | None:
    """The commit of the model on the Hugging Face hub; None if it did not come from there, or this is not known."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "_commit_hash", None)
