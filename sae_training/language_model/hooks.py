"""Reading and replacing activations of the frozen language model, at the places that its hook points name.

`run_with_cache` and `run_with_hooks` of transformer_lens do it too, with the whole block computed in their way for it;
here a block stays the plain and fast one where its places can be tapped (`taps.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from sae_training.language_model.taps import HookPoint, Look, open_point
from sae_training.language_model.twins import BlockSwitch, switch_in

LanguageModel = Any  # HookedTransformer or TransformerBridge: they share methods, not a base class
NamedLook = tuple[str, Look]
"""A hook point's name, and what sees its tensor."""


@torch.inference_mode()
def read_hooks(model: LanguageModel, tokens: Tensor, names: Set[str], stop_at_layer: int | None) -> dict[str, Tensor]:
    """The tensors at the hooks `names`, from a pass that stops before the block `stop_at_layer` (None: never)."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> NamedLook:
        return name, lambda activations: found.update({name: activations})

    with hooked(model, map(keep, names), last=last_block_if_unread(names, stop_at_layer)):
        model(tokens, return_type=None, stop_at_layer=stop_at_layer)
    return found


@contextmanager
def hooked(
    model: LanguageModel,
    reads: Iterable[NamedLook],
    replacements: Iterable[NamedLook] = (),
    last: int | None = None,
) -> Iterator[None]:
    """In here passes of `model` show the tensors at hooks to functions, and those of `replacements` replace them.

    Where nothing is replaced, the residual stream is the same, bit for bit, whatever is read. Nobody asks for what
    comes out of block `last`. Hooks that others placed inside a block before count; none may be placed in here, nor a
    second `hooked` be entered.
    """
    switches: dict[int, BlockSwitch | None] = {}
    looks: dict[int | None, list[tuple[HookPoint, Look]]] = {}
    replaced = [(name, look, True) for name, look in replacements]
    for name, look, replaces in [(name, look, False) for name, look in reads] + replaced:
        point, layer = hook_point_of(model, name), block_number(name)
        if layer is not None and layer not in switches:
            switches[layer] = untouched_switch(model.blocks[layer])
        switch = None if layer is None else switches[layer]
        inside = layer if switch is not None and point not in switch.outside else None
        looks.setdefault(inside, []).append((point, look if replaces else only_read(look)))
    changed = {block_number(name) for name, _, _ in replaced}
    with ExitStack() as stack:
        for layer, of_block in looks.items():
            switch = None if layer is None else switches[layer]
            if switch is None:
                open_points(stack, of_block)
            else:
                stack.enter_context(hooked_inside(switch, of_block, layer in changed, layer == last))
        yield


def untouched_switch(block: Any) -> BlockSwitch | None:
    """None where the block runs with its hook points anyway: it has no twin, or others have hooks in it."""
    switch = switch_in(block)
    return None if switch is None or switch.is_touched() else switch


def only_read(look: Look) -> Look:
    def read(activations: Tensor) -> None:
        look(activations)

    return read


@contextmanager
def hooked_inside(
    switch: BlockSwitch, looks: list[tuple[HookPoint, Look]], replaces: bool, is_last: bool
) -> Iterator[None]:
    """`hooked` for one block that nobody else has touched.

    | what can be tapped | all are only read                        | some are replaced     |
    |--------------------|------------------------------------------|-----------------------|
    | all                | the tapped twin runs                     | the tapped twin runs  |
    | some               | the hooked block, then the tapped twin   | the hooked block runs |
    | nothing            | the hooked block, then the twin          | the hooked block runs |

    Of a block that runs twice, what the latter returns counts; nothing runs for the sake of that alone in the last
    block. Where the twin would run compiled and all are only read, it comes last in any case: its roundings are others.
    """
    tapped = [(switch.taps[point], look) for point, look in looks if point in switch.taps]
    untapped = [(point, look) for point, look in looks if point not in switch.taps]
    in_one_place = len({(tap.part, tap.is_input) for tap, _ in tapped}) < len(tapped)
    if replaces and (untapped or in_one_place):  # in one place, nothing would tell which comes first
        tapped, untapped = [], looks
    runs = [switch.hooked] * bool(untapped) + [switch.tapped] * bool(tapped)
    last_counts = is_last or replaces or (bool(tapped) and switch.compiled_now() is None)
    with ExitStack() as stack:
        for tap, look in tapped:
            stack.enter_context(tap.open(look))
        open_points(stack, untapped)
        stack.enter_context(switch.running(runs[:-1], runs[-1]) if last_counts else switch.running(runs))
        yield


def open_points(stack: ExitStack, looks: list[tuple[HookPoint, Look]]) -> None:
    for point, look in looks:
        stack.enter_context(open_point(point, look))


def last_block_if_unread(names: Set[str], stop_at_layer: int | None) -> int | None:
    """The block before `stop_at_layer`, unless its output is read."""
    if not stop_at_layer:
        return None
    last = stop_at_layer - 1
    outputs = (f"blocks.{last}.hook_resid_post", f"blocks.{last}.hook_out", f"blocks.{stop_at_layer}.")
    return None if any(name.startswith(outputs) for name in names) else last


known_points: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, HookPoint]] = WeakKeyDictionary()


def hook_point_of(model: LanguageModel, name: str) -> HookPoint:
    """`model.hook_dict[name]`, which a bridge makes anew each time, of some thousand entries."""
    points = known_points.setdefault(model, WeakValueDictionary())
    point = points.get(name)
    if point is None:
        point = points[name] = model.hook_dict[name]
    return point


def block_number(hook_point: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", hook_point)
    return int(match.group(1)) if match else None
