"""Lets the blocks of the frozen language model run without their hook points wherever nothing is hooked inside them.

A `TransformerBridge` computes attention step by step and each normalisation twice, so that every intermediate tensor
passes a hook point. A training run reads few of these tensors, and a pass takes an eighth longer than that of the bare
Hugging Face model (SmolLM2, 9 layers of 2,048 tokens, bfloat16 on a CPU). `skip_hook_points` gives each block a twin:
the plain Hugging Face block with the bridge's processed weights, which runs in the block's place. With `compile_lm`, a
compiled copy of the twin (`compile.py`) runs for training rows.

At every pass a block looks for hooks on its parts and for parts that were replaced. If it finds any, it runs as
TransformerLens wrote it. Hooks on the block's input and output do not count, because the twin passes both, nor do
hooks that are open in the twin too (`standing.py`).

Our own hooks (`hooks.py`) rarely need the block itself: most places inside can be tapped in the twin (`taps.py`). For
the few others that are only read, the block runs a second time as TransformerLens wrote it. The residual stream comes
from the twin either way, so what is read at one place does not depend, bit for bit, on where else is read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from sae_training.language_model.taps import Tap, candidate_taps, find_taps, is_close

Forward = Callable[..., Any]

PROBE_TOKENS = 16

compiled_wanted: ContextVar[bool] = ContextVar("compiled_wanted", default=False)


@contextmanager
def compiled_blocks() -> Iterator[None]:
    """In here the blocks that `compile_blocks` has compiled run compiled."""
    token = compiled_wanted.set(True)
    try:
        yield
    finally:
        compiled_wanted.reset(token)


class BlockSwitch:
    """Stands in for the forward of a block, and chooses what runs.

    `hooked` is that forward as TransformerLens wrote it, `twin` the same without hook points. The twin, or its compiled
    copy, runs unless a part has a hook (the hooks that libraries place for themselves aside), or was put in the place
    of another. `outside` are hook points that do not count. `taps` are the places in the twin where tensors of hook
    points pass.
    """

    def __init__(
        self, block: nn.Module, hooked: Forward, twin: Forward, taps: dict[HookPoint, Tap], outside: list[HookPoint]
    ) -> None:
        self.hooked, self.twin, self.taps, self.outside = hooked, twin, taps, outside
        self.compiled: Forward | None = None
        self.standing: dict[int, Tap | None] = {}
        """Hooks at hook points that do not count (`standing.py`), by id: the tap where they are open too, if any."""
        self.changed = False
        """Whether a standing hook without a tap has replaced a tensor in the pass that runs."""
        parts = [part for part in block.modules() if part not in outside]
        self.parts = [(part._modules, tuple(part._modules.values())) for part in parts]
        self.on_points = [hooks for part in parts if isinstance(part, HookPoint) for hooks in hooks_of(part)]
        self.on_others = [hooks for part in parts if not isinstance(part, HookPoint) for hooks in hooks_of(part)]
        self.planned: tuple[Forward, ...] = ()
        update_wrapper(self, hooked)  # the bridge reads the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.planned:
            *before, counts = self.planned
        elif self.is_touched() or kwargs.get("output_attentions"):  # only the block itself has attention patterns
            before, counts = [], self.hooked
        elif self.needs_points():
            return self.run_with_points(*args, **kwargs)
        else:
            before, counts = [], self.fastest()
        for forward in before:
            forward(*args, **kwargs)
        return counts(*args, **kwargs)

    def fastest(self) -> Forward:
        """The compiled twin where it is to run, else the twin (whose taps a compiled one would pass over)."""
        if self.compiled is None or not compiled_wanted.get() or self.standing:
            return self.twin
        return self.compiled

    @contextmanager
    def running(self, forwards: tuple[Forward, ...]) -> Iterator[None]:
        """In here a pass runs `forwards` one after the other, each on the block's input; the output of the last counts.

        Raise RuntimeError inside another such context.
        """
        if self.planned:
            raise RuntimeError("hooked: found a block that is hooked already, expected one `hooked` at a time.")
        self.planned = forwards
        try:
            yield
        finally:
            self.planned = ()

    def needs_points(self) -> bool:
        """Whether a standing hook has no tap, so that only the block itself can show it its tensor."""
        return None in self.standing.values()

    def run_with_points(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the block itself; with the values of the twin's if no standing hook without a tap changed any.

        Gradients are those of the block itself. With a cache of keys, which each run adds to, only the block runs.
        """
        self.changed = False
        out = self.hooked(*args, **kwargs)
        if self.changed or any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            return out
        return with_values_of(self.twin(*args, **kwargs), out)

    def is_touched(self) -> bool:
        # These are references to torch's own dicts: about 20 us a block, six times faster than walking its modules.
        return (
            any(hook not in self.standing for hooks in self.on_points for hook in hooks)
            or any(is_foreign(hook) for hooks in self.on_others for hook in hooks.values())
            or any(tuple(parts.values()) != known for parts, known in self.parts)
        )


def with_values_of(values: Any, out: Any) -> Any:
    """`values` with the gradient of `out`: two outputs of a block (a tensor, or a tuple with it first)."""
    if isinstance(out, tuple):
        return (with_values_of(values[0], out[0]), *values[1:])
    return values.detach() + (out - out.detach()) if out.requires_grad else values


def is_foreign(hook: Callable[..., Any]) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "transformer_lens."))


def hooks_of(part: nn.Module) -> list[dict[int, Any]]:
    return [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks]


# ----------------------------------------------------------------------------------------------------- making twins


@torch.inference_mode()
def skip_hook_points(bridge: TransformerBridge) -> None:
    """Give each block of `bridge` a twin, to run wherever no hook points are in use.

    A block stays as it is if its twin does not compute the same on a few tokens, and a hook point has no tap if no
    place in the twin shows the same tensor. The weights should be float32, where rounding is smallest.
    """
    # Keys and values of past tokens serve generation only, which asks for them itself.
    config: Any = bridge.original_model.config
    config.use_cache = False
    switches: dict[nn.Module, BlockSwitch | None] = {}
    ids = torch.arange(PROBE_TOKENS, device=bridge.cfg.device) % bridge.cfg.d_vocab
    with ExitStack() as stack:
        for block in bridge.blocks:

            def trial(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: Any = block) -> None:
                switches[layer] = working_switch(block, args, kwargs)

            handle = block.original_component.register_forward_pre_hook(trial, with_kwargs=True)
            stack.callback(handle.remove)
        bridge(ids.unsqueeze(0), return_type=None)
    for layer, switch in switches.items():
        if switch is not None:
            vars(layer)["forward"] = switch  # not by setattr, which TransformerLens passes on to what it wraps


def working_switch(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockSwitch | None:
    """A switch with a twin that computes what the block does with these arguments; None if it has no such twin."""
    hooked, copies = block.original_component.forward, {}
    copied = twin_of(block.original_component, copies)
    if copied is None:
        return None
    twin = on_its_device(copied, block.original_component)
    agrees, taps = False, {}
    with suppress(Exception):  # other people's code, perhaps called in a way it is not meant for
        agrees = is_close(twin(*args, **kwargs), hooked(*args, **kwargs))
        taps = find_taps(candidate_taps(copies), lambda: hooked(*args, **kwargs), lambda: twin(*args, **kwargs))
    return BlockSwitch(block, hooked, twin, taps, [block.hook_in, block.hook_out]) if agrees else None


def on_its_device(forward: Forward, layer: nn.Module) -> Forward:
    """`forward`, to which tensors come where accelerate has put the layer (`device_map`), as to the layer's own one."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        return forward

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(layer, *args, **kwargs)
        return forward(*args, **kwargs)

    return run


def twin_of(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """A copy of `module` with the same tensors, without what TransformerLens has put around and between its parts.

    The dicts of parameters and buffers are shared, so that the twin follows casts of the original. Return None if some
    part holds a tensor as a plain attribute, which would not follow. `copies` receives the copy of each part.
    """
    around = [module]
    while isinstance(wrapped := module._modules.get("_original_component"), nn.Module):
        module = wrapped
        around.append(module)
    if isinstance(module, HookPoint):  # between the parts of a HookedTransformer's block
        return nn.Identity()
    twin = copy.copy(module)
    parts = {name: None if part is None else twin_of(part, copies) for name, part in module._modules.items()}
    lost = any(parts[name] is None for name, part in module._modules.items() if part is not None)
    if lost or any(isinstance(value, Tensor) for value in vars(twin).values()):
        return None
    twin._modules = parts
    of_hooks = [name for name, value in vars(twin).items() if "_hooks" in name and isinstance(value, OrderedDict)]
    vars(twin).update({name: OrderedDict() for name in of_hooks})
    vars(twin).pop("forward", None)
    # A numpy number (HookedTransformer's attn_scale) cannot be compiled in inference mode.
    vars(twin).update({name: value.item() for name, value in vars(twin).items() if isinstance(value, np.generic)})
    twin.training = False
    copies.update(dict.fromkeys(around, twin))
    return twin


def switch_in(block: Any) -> BlockSwitch | None:
    """The switch in a block of the language model; None if it has none."""
    found = vars(getattr(block, "original_component", block)).get("forward")
    return found if isinstance(found, BlockSwitch) else None
