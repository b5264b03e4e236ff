"""Reading and replacing activations of the frozen language model, at the places that its hook points name.

`run_with_cache` and `run_with_hooks` of transformer_lens do it too, with the whole block computed in their way for it;
here a block stays the plain and fast one where its places can be tapped (`taps.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sae_training.blocks import BlockSwitch, switch_in
from sae_training.taps import HookPoint, Look, open_point

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
    comes out of block `last`.
    """
    by_block: dict[BlockSwitch | None, list[tuple[HookPoint, Look, bool]]] = {}
    last_switch = None if last is None else switch_in(model.blocks[last])
    for looks, replaces in ((reads, False), (replacements, True)):
        for name, look in looks:
            point, layer = hook_point_of(model, name), block_number(name)
            switch = None if layer is None else switch_in(model.blocks[layer])
            if switch is not None and (point in switch.outside or switch.is_touched()):
                switch = None  # costs nothing; or somebody else has hooks there, and runs the block as it is anyway
            by_block.setdefault(switch, []).append((point, look, replaces))
    with ExitStack() as stack:
        for switch, looks in by_block.items():
            if switch is None:
                for point, look, _ in looks:
                    stack.enter_context(open_point(point, look))
            else:
                stack.enter_context(hooked_inside(switch, looks, switch is last_switch))
        yield


@contextmanager
def hooked_inside(switch: BlockSwitch, looks: list[tuple[HookPoint, Look, bool]], is_last: bool) -> Iterator[None]:
    """`hooked` for one block that nobody else has touched.

    | what can be tapped | only read                                | something is replaced |
    |--------------------|------------------------------------------|-----------------------|
    | all                | the tapped twin runs                     | the tapped twin runs  |
    | some               | the hooked block, then the tapped twin   | the hooked block runs |
    | nothing            | the hooked block, then the twin          | the hooked block runs |

    Of a block that runs twice, what the latter returns counts. When the twin runs compiled, and something is only read,
    the compiled twin comes last in any case: its roundings are others.
    """
    replaces = any(replacing for _, _, replacing in looks)
    tapped = [(switch.taps[point], look) for point, look, _ in looks if point in switch.taps]
    others = [(point, look) for point, look, _ in looks if point not in switch.taps]
    if replaces and others:
        tapped, others = [], [(point, look) for point, look, _ in looks]
    runs = [switch.hooked] * bool(others) + [switch.tapped] * bool(tapped)
    with ExitStack() as stack:
        for tap, look in tapped:
            stack.enter_context(tap.open(look))
        for point, look in others:
            stack.enter_context(open_point(point, look))
        if is_last or replaces or (tapped and not switch.is_compiled()):
            stack.enter_context(switch.running(runs[:-1], instead=runs[-1]))
        else:
            stack.enter_context(switch.running(runs))
        yield


def last_block_if_unread(names: Set[str], stop_at_layer: int | None) -> int | None:
    """The block before `stop_at_layer`, unless its output is read."""
    if not stop_at_layer:
        return None
    last = stop_at_layer - 1
    is_read = any(name in names for name in (f"blocks.{last}.hook_resid_post", f"blocks.{last}.hook_out"))
    return None if is_read else last


known_points: WeakKeyDictionary[nn.Module, dict[str, HookPoint]] = WeakKeyDictionary()


def hook_point_of(model: LanguageModel, name: str) -> HookPoint:
    """`model.hook_dict[name]`, which a bridge makes anew each time, of some thousand entries."""
    points = known_points.setdefault(model, {})
    if name not in points:
        points[name] = model.hook_dict[name]
    return points[name]


def block_number(hook_point: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", hook_point)
    return int(match.group(1)) if match else None
