"""Reads and replaces activations of the frozen language model at its hook points.

`run_with_cache` and `run_with_hooks` of TransformerLens can do this too, but then run its slower hooked blocks. We run
the plain twin of a block (`twins.py`) wherever its tensors can be tapped (`taps.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sae_training.language_model.load import LanguageModel
from sae_training.language_model.taps import Look, open_point
from sae_training.language_model.twins import BlockSwitch, Forward, switch_in

NamedLook = tuple[str, Look]
"""A hook point's name, and the function that is shown its tensor."""


@torch.inference_mode()
def read_hooks(
    model: LanguageModel, tokens: Tensor, names: Set[str], stop_at_layer: int | None, padded: bool = False
) -> dict[str, Tensor]:
    """The tensors at the hooks `names`, from a pass that stops before the block `stop_at_layer` (None: never).

    `padded` as for `inputs_of`.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> NamedLook:
        return name, lambda activations: found.update({name: activations})

    with hooked(model, map(keep, names), last=last_block_if_unread(names, stop_at_layer)):
        model(**inputs_of(model, tokens, padded), return_type=None, stop_at_layer=stop_at_layer)
    return found


def inputs_of(model: LanguageModel, tokens: Tensor, padded: bool) -> dict[str, Tensor]:
    """The arguments of a pass of `model` over `tokens` (prompts, positions), where it takes them.

    `padded`: ids below 0 are padding at the ends of prompts, which no position attends to. (What is computed there
    means nothing.) Without, no mask is made, because attention is faster so.
    """
    tokens = tokens.to(model.cfg.device)
    if not padded:
        return {"input": tokens}
    return {"input": tokens.clamp_min(0), "attention_mask": (tokens >= 0).long()}


@dataclass(frozen=True)
class Hook:
    """A function that is to be shown the tensor of a hook point, and whether what it returns takes its place."""

    point: HookPoint
    look: Look
    replaces: bool


@contextmanager
def hooked(
    model: LanguageModel,
    reads: Iterable[NamedLook],
    replacements: Iterable[NamedLook] = (),
    last: int | None = None,
) -> Iterator[None]:
    """In here, passes of `model` show the tensors at hooks to functions; those of `replacements` replace the tensors.

    If nothing is replaced, the residual stream is the same, bit for bit, whatever is read. `last` is a block whose
    output nobody uses. Hooks that others placed inside a block before run first; nobody may place hooks in here, nor
    enter a second `hooked`.
    """
    in_blocks: dict[int | None, list[Hook]] = {}
    for replaces, looks in ((False, reads), (True, replacements)):
        for name, look in looks:
            hook = Hook(hook_point_of(model, name), look if replaces else only_read(look), replaces)
            in_blocks.setdefault(block_number(name), []).append(hook)
    with ExitStack() as stack:
        for layer, hooks in in_blocks.items():
            switch = None if layer is None else switch_in(model.blocks[layer])
            if switch is None or switch.is_touched() or switch.needs_points():  # it runs with its hook points anyway
                open_points(stack, hooks)
            else:
                open_in_block(stack, switch, hooks, layer == last)
        yield


def open_in_block(stack: ExitStack, switch: BlockSwitch, hooks: Sequence[Hook], is_last: bool) -> None:
    """Open `hooks` at their taps or their hook points, for a block in which nobody else has any."""
    inside = [hook for hook in hooks if hook.point not in switch.outside]
    tapped = [hook for hook in inside if hook.point in switch.taps]
    untapped = [hook for hook in inside if hook.point not in switch.taps]
    replaces = any(hook.replaces for hook in hooks)
    places = {(switch.taps[hook.point].part, switch.taps[hook.point].is_input) for hook in tapped}
    if replaces and (untapped or len(places) < len(tapped)):
        # One pass must show all of them in the order of the model, which two hooks at one place would not have.
        tapped, untapped = [], inside
    for hook in tapped:
        stack.enter_context(switch.taps[hook.point].open(hook.look))
    open_points(stack, [*(hook for hook in hooks if hook.point in switch.outside), *untapped])
    if inside:
        stack.enter_context(switch.running(forwards(switch, bool(tapped), bool(untapped), replaces or is_last)))


def forwards(switch: BlockSwitch, tapped: bool, untapped: bool, once: bool) -> tuple[Forward, ...]:
    """Return what runs in a block that has hooks inside, in order; the output of the last counts.

    `once`: something is replaced, or nobody uses the output. Otherwise the output is always that of the block without
    hooks, so that reading a place changes no bit of another.
    """
    match tapped, untapped:
        case True, False:
            run = (switch.twin,)
        case False, True:
            run = (switch.hooked,)
        case _:
            run = (switch.hooked, switch.twin)
    return run if once or run[-1] is switch.fastest() else (*run, switch.fastest())


def only_read(look: Look) -> Look:
    def read(activations: Tensor) -> None:
        look(activations)

    return read


def open_points(stack: ExitStack, hooks: Iterable[Hook]) -> None:
    for hook in hooks:
        stack.enter_context(open_point(hook.point, hook.look))


def last_block_if_unread(names: Set[str], stop_at_layer: int | None) -> int | None:
    """The block before `stop_at_layer`, unless its output is read."""
    if not stop_at_layer:
        return None
    last = stop_at_layer - 1
    outputs = (f"blocks.{last}.hook_resid_post", f"blocks.{last}.hook_out", f"blocks.{stop_at_layer}.")
    return None if any(name.startswith(outputs) for name in names) else last


known_points: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, HookPoint]] = WeakKeyDictionary()


def hook_point_of(model: LanguageModel, name: str) -> HookPoint:
    """`model.hook_dict[name]`, remembered because a bridge makes the dict anew each time (SmolLM2: 7 ms)."""
    points = known_points.setdefault(model, WeakValueDictionary())
    point = points.get(name)
    if point is None:
        point = points[name] = model.hook_dict[name]
    return point


def block_number(hook_point: str) -> int | None:
    """The L of a name `blocks.L.…`; None for a hook outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook_point)
    return int(match.group(1)) if match else None
