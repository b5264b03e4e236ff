"""Loading the frozen language model, and finding the place in it that an autoencoder reads.

The only file that imports transformer_lens. `HookedTransformer` serves the names it knows (with its usual weight
processing, as SAEs of the mats era expect); every other model, local folders included, is a `TransformerBridge` in
compatibility mode, which processes the weights in the same way. All later code uses only what both have:
the forward with `stop_at_layer`, `hook_dict`, `run_with_hooks`, `tokenizer`, `cfg`.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_training.blocks import skip_hook_points
from sae_training.bundled import bundled_model
from sae_training.hooks import block_number, read_hooks
from sae_training.precision import bfloat16_is_fast

__all__ = [
    "HookPoint",
    "HookSite",
    "HookedRootModule",
    "check_order",
    "find_hook_site",
    "find_target_site",
    "fingerprint",
    "language_model_dtype",
    "load_language_model",
    "revision",
]

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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


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


# ------------------------------------------------------------------------------------------------------------- hooks


@dataclass(frozen=True)
class HookSite:
    """Where activations are read and written back.

    `name` is the hook as the user wrote it. `read_name` and `stop_at_layer` are the cheapest way to read the same
    tensor: the input of block L equals the output of block L - 1, so block L need not run. `head_axis` says whether
    the tensor is (prompts, positions, heads, d_head).
    """

    name: str
    read_name: str
    stop_at_layer: int | None
    head_index: int | None
    head_axis: bool
    d_in: int

    @property
    def layer(self) -> int | None:
        return block_number(self.name)


def find_hook_site(
    model: LanguageModel, hook_point: str, head_index: int | None = None, d_in: int | None = None
) -> HookSite:
    """Check that `hook_point` exists, holds one vector a position, and has width `d_in` (None: any width)."""
    if hook_point not in model.hook_dict:
        raise ValueError(unknown_hook_message(model, hook_point))
    read_name, stop_at_layer = cheapest_read(hook_point)
    shape = probe_shape(model, read_name, stop_at_layer)
    positions_first = shape[:2] == (1, PROBE_LENGTH)
    if len(shape) not in (3, 4) or not positions_first:
        raise ValueError(
            f"hook_point: {hook_point} has shape {shape} for 1 prompt of {PROBE_LENGTH} tokens; expected "
            "(prompts, positions, width) or (prompts, positions, heads, width). Choose a hook with one vector a "
            "position."
        )
    head_axis = len(shape) == 4
    width = find_width(hook_point, shape, head_index)
    if d_in is not None and d_in != width:
        raise ValueError(
            f"d_in: got {d_in}, but {hook_point} of this model is {width} wide; use d_in={width}, or d_in=None to take "
            "the width from the model."
        )
    return HookSite(hook_point, read_name, stop_at_layer, head_index, head_axis, width)


def find_target_site(model: LanguageModel, target_hook_point: str, d_out: int | None = None) -> HookSite:
    """`find_hook_site` for the hook that a transcoder predicts."""
    try:
        return find_hook_site(model, target_hook_point, None, d_out)
    except ValueError as error:
        named = str(error).replace("d_in", "d_out")
        raise ValueError(re.sub(r"\bhook_point(_head_index)?:", r"target_hook_point:", named, count=1)) from error


@torch.inference_mode()
def check_order(model: LanguageModel, site: HookSite, target: HookSite) -> None:
    """ValueError unless the forward pass comes to `site` before `target`, whose place a transcoder's output takes."""
    seen: list[str] = []
    tokens = torch.zeros(1, PROBE_LENGTH, dtype=torch.long, device=model.cfg.device)
    hooks = [(name, lambda activations, hook, name=name: seen.append(name)) for name in (site.name, target.name)]
    model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    if seen != [site.name, target.name]:
        raise ValueError(
            f"target_hook_point: the model computes {target.name} before {site.name}, expected a hook that comes after "
            "hook_point; swap them, or choose another."
        )


def find_width(hook_point: str, shape: tuple[int, ...], head_index: int | None) -> int:
    if len(shape) == 3:
        if head_index is not None:
            raise ValueError(
                f"hook_point_head_index: got {head_index}, but {hook_point} has no head axis (shape {shape}); use None."
            )
        return shape[-1]
    n_heads, d_head = shape[-2:]
    if head_index is None:
        return n_heads * d_head
    if not 0 <= head_index < n_heads:
        raise ValueError(
            f"hook_point_head_index: got {head_index}, but {hook_point} has {n_heads} heads; use 0 to {n_heads - 1}."
        )
    return d_head


PROBE_LENGTH = 3


@torch.inference_mode()
def probe_shape(model: LanguageModel, name: str, stop_at_layer: int | None) -> tuple[int, ...]:
    tokens = torch.zeros(1, PROBE_LENGTH, dtype=torch.long, device=model.cfg.device)
    found = read_hooks(model, tokens, {name}, stop_at_layer)
    if name not in found:
        raise ValueError(f"hook_point: {name} exists in this model but did not run; choose another hook.")
    return tuple(found[name].shape)


def cheapest_read(hook_point: str) -> tuple[str, int | None]:
    """The hook to cache and the block to stop before, for the least work that yields `hook_point`."""
    layer = block_number(hook_point)
    if layer is None:
        return hook_point, 0 if hook_point in ("hook_embed", "hook_pos_embed") else None
    if layer > 0 and hook_point == f"blocks.{layer}.hook_resid_pre":
        return f"blocks.{layer - 1}.hook_resid_post", layer
    return hook_point, layer + 1


def unknown_hook_message(model: LanguageModel, hook_point: str) -> str:
    names = list(model.hook_dict)
    n_blocks = model.cfg.n_layers
    layer = block_number(hook_point)
    if layer is not None and layer >= n_blocks:
        return (
            f"hook_point: {hook_point} names block {layer}, but this model has {n_blocks}; "
            f"choose a layer from 0 to {n_blocks - 1}."
        )
    near = difflib.get_close_matches(hook_point, names, n=1)
    # The bridge has a second name, of its own, for every hook: the input and output of each of its components.
    familiar = [name for name in names if not name.endswith((".hook_in", ".hook_out", "hook_cos", "hook_sin"))]
    in_block = [name.replace("blocks.0.", "blocks.{layer}.") for name in familiar if name.startswith("blocks.0.")]
    outside = [name for name in familiar if block_number(name) is None]
    suggestion = f" Did you mean {near[0]}?" if near else ""
    return (
        f"hook_point: this model has no hook {hook_point!r}.{suggestion}\n"
        f"Its hooks, for layer 0 to {n_blocks - 1}: {', '.join(in_block + outside)}."
    )
