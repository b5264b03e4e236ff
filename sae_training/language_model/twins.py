"""Blocks of the frozen language model, run without their hook points wherever nothing is hooked inside them.

A `TransformerBridge` computes attention step by step and each normalisation twice, so that every intermediate tensor
passes a hook point. A run reads a few places: nearly all of that is for nothing, and takes an eighth longer than the
Hugging Face model alone (SmolLM2, 9 layers of 2,048 tokens, bfloat16 on a CPU). `skip_hook_points` gives each block
a twin: the Hugging Face block itself, with the bridge's (processed) weights. `compile_blocks` sends twins through
torch.compile, for training rows only.

Hooks are looked for at every pass, and so are parts that were put in the place of others: a block that has been touched
inside runs as transformer_lens wrote it. torch.compile by itself would not notice hooks that are added later
(`torch._dynamo.config.skip_nnmodule_hook_guards`). What goes into a block and what comes out of it lie outside: hooks
there cost nothing.

Our own hooks (`hooks.py`) need not touch a block: most places inside it are what goes into some part of the Hugging
Face block, or comes out of one, and can be tapped there (`Tap`). For the few others that are only read, the block runs
a second time as transformer_lens wrote it. The residual stream is that of the twins either way, so what is read at a
place does not depend, down to the last bit, on where else is read.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae_training.language_model.taps import HookPoint, Tap, candidate_taps, find_taps, is_close

LanguageModel = Any

Forward = Callable[..., Any]

PROBE_TOKENS = 16

compiled_wanted: ContextVar[bool] = ContextVar("compiled_wanted", default=False)


@contextmanager
def compiled_blocks() -> Iterator[None]:
    """In here the blocks that `compile_blocks` has treated run compiled.

    Elsewhere they do not: evaluations and probes come with tokens of other shapes, and each would be compiled anew.
    """
    token = compiled_wanted.set(True)
    try:
        yield
    finally:
        compiled_wanted.reset(token)


class BlockSwitch:
    """Stands in for the forward of `block` (`hooked`), and lets its twin run while nothing inside is touched: no hook
    on any part, but for those that libraries place for themselves, and no part put in the place of another.

    `outside` are hook points that do not count. `first` and `last` are those of the residual stream, if the twin had
    them within itself and has lost them. `tapped` is a second twin, for hooks: what is compiled never has any.
    """

    def __init__(
        self,
        block: nn.Module,
        hooked: Forward,
        twin: nn.Module,
        tapped: nn.Module,
        outside: list[nn.Module],
        first: nn.Module | None = None,
        last: nn.Module | None = None,
    ) -> None:
        self.hooked, self.twin, self.tapped, self.outside = hooked, twin, tapped, outside
        self.first, self.last = first, last
        parts = [part for part in block.modules() if part not in outside]
        self.parts = [(part._modules, tuple(part._modules.values())) for part in parts]
        self.on_points = [hooks for part in parts if hasattr(part, "fwd_hooks") for hooks in hooks_of(part)]
        self.on_others = [hooks for part in parts if not hasattr(part, "fwd_hooks") for hooks in hooks_of(part)]
        self.compiled: Forward | None = None
        self.taps: dict[HookPoint, Tap] = {}
        """Where in `tapped` the same passes."""
        self.beside: tuple[Forward, ...] = ()
        """What runs for the sake of its hooks, beside that whose output counts."""
        self.instead: Forward | None = None
        """What runs in place of the twin."""
        functools.update_wrapper(self, hooked)  # the bridge reads the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        planned = self.beside or self.instead
        # Asked for attention patterns (run_with_cache of the bridge does), only the block itself has them.
        if not planned and (self.is_touched() or kwargs.get("output_attentions")):
            return self.hooked(*args, **kwargs)
        for forward in self.beside:
            forward(*args, **kwargs)
        if self.instead is not None:
            return self.instead(*args, **kwargs)
        run = self.compiled_now() or self.twin
        if self.first is None or self.last is None:
            return run(*args, **kwargs)
        return self.last(run(self.first(args[0]), *args[1:], **kwargs))

    @contextmanager
    def running(self, beside: Sequence[Forward], instead: Forward | None = None) -> Iterator[None]:
        """In here these run, as the attributes of the name say; RuntimeError within another such context."""
        if self.beside or self.instead:
            raise RuntimeError("hooked: found a block that is hooked already, expected one `hooked` at a time.")
        self.beside, self.instead = tuple(beside), instead
        try:
            yield
        finally:
            self.beside, self.instead = (), None

    def compiled_now(self) -> Forward | None:
        """The compiled twin, where it is what runs just now."""
        return self.compiled if compiled_wanted.get() else None

    def is_touched(self) -> bool:
        # Of dicts that torch keeps: some 20 us a block, a sixth of what going through its modules takes.
        return (
            any(self.on_points)
            or any(is_foreign(hook) for hooks in self.on_others for hook in hooks.values())
            or any(tuple(parts.values()) != known for parts, known in self.parts)
        )


def is_foreign(hook: Callable[..., Any]) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "transformer_lens."))


def hooks_of(part: nn.Module) -> list[dict[int, Any]]:
    return [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks]


def skip_hook_points(bridge: LanguageModel) -> None:
    """Let the blocks of a `TransformerBridge` run without their hook points where none is in use.

    A block whose twin does not compute the same on a few tokens stays as it is, and a hook point has a tap if the same
    passes there; float32 shows that best.
    """
    # Keys and values of past tokens serve generation alone, which asks for them itself.
    bridge.original_model.config.use_cache = False
    found = {block.original_component: bridge_switch(block) for block in bridge.blocks}
    switches = {layer: with_taps for layer, with_taps in found.items() if with_taps is not None}
    agrees: dict[nn.Module, bool] = {}

    def trial(layer: nn.Module, switch: BlockSwitch, candidates: dict[HookPoint, list[Tap]]) -> Forward:
        @functools.wraps(switch.hooked)
        def both(*args: Any, **kwargs: Any) -> Any:
            expected = switch.hooked(*args, **kwargs)
            with suppress(Exception):  # other people's code, called in a way it may not be meant for
                agrees[layer] = is_close(switch.twin(*args, **kwargs), expected)
                switch.taps = find_taps(
                    candidates, lambda: switch.hooked(*args, **kwargs), lambda: switch.tapped(*args, **kwargs)
                )
            return expected

        return both

    for layer, (switch, candidates) in switches.items():
        set_forward(layer, trial(layer, switch, candidates))
    try:
        ids = torch.arange(PROBE_TOKENS, device=bridge.cfg.device) % bridge.cfg.d_vocab
        with torch.inference_mode():
            bridge(ids.unsqueeze(0), return_type=None)
    finally:
        for layer, (switch, _) in switches.items():
            set_forward(layer, switch if agrees.get(layer) else switch.hooked)


def bridge_switch(block: Any) -> tuple[BlockSwitch, dict[HookPoint, list[Tap]]] | None:
    """For the Hugging Face block that the bridge's `block` has between its first and last hook, with the taps it may
    have; None without a twin.
    """
    layer = block.original_component
    copies: dict[nn.Module, nn.Module] = {}
    twin, tapped = twin_of(layer), twin_of(layer, copies)
    if twin is None or tapped is None:
        return None
    outside = [block.hook_in, block.hook_out]
    return BlockSwitch(block, layer.forward, twin, tapped, outside), candidate_taps(copies)


def twin_of(module: nn.Module, copies: dict[nn.Module, nn.Module] | None = None) -> nn.Module | None:
    """A copy of `module` with the same tensors, without what transformer_lens has put around and between its parts.

    The dicts of parameters and buffers are shared, so that the twin follows the original to other precisions; None if
    some part holds a tensor by itself, which would not follow. `copies` gets what each part has become.
    """
    copies = {} if copies is None else copies
    around = [module]
    while isinstance(wrapped := module._modules.get("_original_component"), nn.Module):
        module = wrapped
        around.append(module)
    if hasattr(module, "fwd_hooks"):
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
    """The switch that stands in a block of the language model, None without one."""
    found = vars(getattr(block, "original_component", block)).get("forward")
    return found if isinstance(found, BlockSwitch) else None


def set_forward(module: nn.Module, forward: Forward) -> None:
    vars(module)["forward"] = forward  # not by setattr, which transformer_lens passes on to what it wraps
