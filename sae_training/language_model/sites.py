"""Finds the places in the language model that an autoencoder reads and writes: hook points, checked by a short pass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import with_defaults
from sae_training.language_model.hooks import block_number, read_hooks
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.switches import switch_on

PROBE_LENGTH = 3


@dataclass(frozen=True)
class HookSite:
    """Where activations are read and written back.

    `name` is the hook as the user wrote it. `read_name` and `stop_at_layer` are the cheapest way to read the same
    tensor: the input of block L equals the output of block L - 1, so block L need not run. `head_index` is the one
    head that is read (None: all). `head_axis` says whether the tensor is (prompts, positions, heads, d_head).
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
    model: LanguageModel,
    hook_point: str,
    head_index: int | None = None,
    d_in: int | None = None,
    field: str = "hook_point",
    width_field: str = "d_in",
    is_trained: bool = False,
) -> HookSite:
    """The place `hook_point`; ValueError unless it exists and holds one vector of width `d_in` (None: any) a position.

    If TransformerLens computes it only with a switch, `model` has the switch on from now on. `field` and `width_field`
    are the config fields that name the hook and the width, for the error. So is `is_trained`: there are weights of
    this width.
    """
    if hook_point not in model.hook_dict:
        raise ValueError(f"{field}: {unknown_hook_message(model, hook_point)}")
    switch_on(model, hook_point, field)
    read_name, stop_at_layer = cheapest_read(hook_point)
    shape = probe_shape(model, read_name, stop_at_layer)
    if shape is None:
        raise ValueError(f"{field}: {read_name} exists in this model but did not run; choose another hook.")
    if len(shape) not in (3, 4) or shape[:2] != (1, PROBE_LENGTH):
        raise ValueError(
            f"{field}: {hook_point} has shape {shape} for 1 prompt of {PROBE_LENGTH} tokens; expected "
            "(prompts, positions, width) or (prompts, positions, heads, width). Choose a hook with one vector a "
            "position."
        )
    width = find_width(hook_point, shape, head_index)
    if d_in is not None and d_in != width and is_trained:
        raise ValueError(
            f"{width_field}: found weights for {d_in} values a position, expected {width}, as {hook_point} of this "
            f"model has; give the model that they were trained on (model_name), or another {field} if their files name "
            "none."
        )
    if d_in is not None and d_in != width:
        raise ValueError(
            f"{width_field}: got {d_in}, but {hook_point} of this model is {width} wide; use {width_field}={width}, or "
            f"{width_field}=None to take the width from the model."
        )
    return HookSite(hook_point, read_name, stop_at_layer, head_index, len(shape) == 4, width)


@torch.inference_mode()
def check_order(model: LanguageModel, site: HookSite, target: HookSite) -> None:
    """Raise ValueError unless the forward pass reaches `site` before `target`, which a transcoder's output replaces."""
    seen: list[str] = []
    hooks = [(name, lambda activations, hook, name=name: seen.append(name)) for name in (site.name, target.name)]
    model.run_with_hooks(probe_tokens(model), fwd_hooks=hooks, return_type=None)
    if seen != [site.name, target.name]:
        raise ValueError(
            f"target_hook_point: the model computes {target.name} before {site.name}, expected a hook that comes after "
            "hook_point; swap them, or choose another."
        )


def find_width(hook_point: str, shape: tuple[int, ...], head_index: int | None) -> int:
    """The width of the vector at a position: of one head if `head_index` is given, else of all heads side by side."""
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


def probe_shape(model: LanguageModel, name: str, stop_at_layer: int | None) -> tuple[int, ...] | None:
    """The shape of the hook's tensor for one prompt of PROBE_LENGTH tokens; None if a pass does not reach the hook."""
    found = read_hooks(model, probe_tokens(model), {name}, stop_at_layer)
    return tuple(found[name].shape) if name in found else None


def probe_tokens(model: LanguageModel) -> torch.Tensor:
    return torch.zeros(1, PROBE_LENGTH, dtype=torch.long, device=model.cfg.device)


def cheapest_read(hook_point: str) -> tuple[str, int | None]:
    """The hook to read and the block to stop before, for the least work that yields the tensor at `hook_point`."""
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
            f"{hook_point} names block {layer}, but this model has {n_blocks}; choose a layer from 0 to {n_blocks - 1}."
        )
    near = difflib.get_close_matches(hook_point, names, n=1)
    # The bridge has a second name, of its own, for every hook: the input or output of one of its components.
    familiar = [name for name in names if not name.endswith((".hook_in", ".hook_out", "hook_cos", "hook_sin"))]
    in_block = [name.replace("blocks.0.", "blocks.{layer}.") for name in familiar if name.startswith("blocks.0.")]
    outside = [name for name in familiar if block_number(name) is None]
    suggestion = f" Did you mean {near[0]}?" if near else ""
    return (
        f"this model has no hook {hook_point!r}.{suggestion}\n"
        f"Its hooks, for layer 0 to {n_blocks - 1}: {', '.join(in_block + outside)}."
    )


@dataclass(frozen=True)
class Sites:
    """What an autoencoder reads (`inputs`) and what it reconstructs (`targets`).

    An ordinary autoencoder reconstructs its input: both are the same one hook. The target of a transcoder is another
    hook. The sites of a store are those of all autoencoders that it serves (`merged`).
    """

    inputs: tuple[HookSite, ...]
    targets: tuple[HookSite, ...]

    @property
    def all(self) -> tuple[HookSite, ...]:
        """Every hook once, inputs first."""
        return tuple(dict.fromkeys(self.inputs + self.targets))

    @property
    def input(self) -> HookSite:
        """The one input; ValueError if there are several."""
        (site,) = self.inputs
        return site

    @property
    def target(self) -> HookSite:
        """The one target; ValueError if there are several."""
        (site,) = self.targets
        return site


def merged(parts: Iterable[Sites]) -> Sites:
    """Return the sites of several autoencoders as one, each hook once."""
    parts = list(parts)
    inputs = dict.fromkeys(site for sites in parts for site in sites.inputs)
    targets = dict.fromkeys(site for sites in parts for site in sites.targets)
    return Sites(tuple(inputs), tuple(targets))


def find_sites(cfg: Any, model: LanguageModel, is_trained: bool = False) -> Sites:
    """Find the hooks of `cfg` in `model`. Raise ValueError where they do not fit the model, or each other.

    `is_trained`: there are weights already, whose widths cannot be changed.
    """
    cfg = with_defaults(cfg)
    site = find_hook_site(model, cfg.resolved_hook_point, cfg.hook_point_head_index, cfg.d_in, is_trained=is_trained)
    target_hook_point = cfg.resolved_target_hook_point
    if target_hook_point is None:
        return Sites((site,), (site,))
    target_site = find_hook_site(model, target_hook_point, None, cfg.d_out, "target_hook_point", "d_out", is_trained)
    check_order(model, site, target_site)
    return Sites((site,), (target_site,))


def sites_on_disk(cfg: Any, d_in: int, d_out: int) -> Sites:
    """Return the hooks of `cfg` without a model, for activations on a disk: their names and widths say all of them."""
    cfg = with_defaults(cfg)
    head = cfg.hook_point_head_index
    name, target = cfg.resolved_hook_point, cfg.resolved_target_hook_point
    site = HookSite(name, *cheapest_read(name), head, head is not None, d_in)
    return Sites((site,), (site if target is None else HookSite(target, *cheapest_read(target), None, False, d_out),))


def with_widths(cfg: LanguageModelSAERunnerConfig, sites: Sites) -> LanguageModelSAERunnerConfig:
    """Return `cfg` with the widths of its `sites`: d_in and, for a transcoder, d_out."""
    d_out = None if cfg.target_hook_point is None else sites.target.d_in
    return dataclasses.replace(cfg, d_in=sites.input.d_in, d_out=d_out)


def check_context_size(context_size: int, model: LanguageModel) -> None:
    if context_size > model.cfg.n_ctx:
        raise ValueError(
            f"context_size: got {context_size}, but the model reads at most {model.cfg.n_ctx} tokens; use "
            f"{model.cfg.n_ctx} or less."
        )
