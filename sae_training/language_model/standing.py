"""Hooks that stand for as long as a context lasts, whoever runs the model meanwhile, and hook points lent to the model.

`hooked` (hooks.py) is for one pass, which it plans. A standing hook is for whatever comes: plain calls, `generate`,
`run_with_cache` and other people's hooks. So it is open at its hook point and, where the twin of the block has a tap,
there too: the tensor is shown once, whichever of the two runs. Without a tap both run, and the twin's output counts if
nothing was replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sae_training.language_model.hooks import block_number, hook_point_of, known_points
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.taps import Look, Tap, open_point
from sae_training.language_model.twins import BlockSwitch, switch_in


@contextmanager
def standing_hook(model: LanguageModel, name: str, look: Look) -> Iterator[None]:
    """In here every pass of `model` shows the tensor at the hook point `name` to `look`, which may replace it.

    Hooks at one place see the tensor in the order in which they came. While nothing is replaced, the model computes the
    same bits as without, except where it generates with a cache of keys through a block that has no tap for the hook.
    """
    point, layer = hook_point_of(model, name), block_number(name)
    switch = None if layer is None else switch_in(model.blocks[layer])
    with ExitStack() as stack:
        if switch is None or point in switch.outside:
            stack.enter_context(open_point(point, look, is_permanent=True))
        else:
            tap = free_tap(switch, point)
            if tap is not None:
                stack.enter_context(tap.open(look))
            at_point = look if tap is not None else noting_changes(look, switch)
            hook = stack.enter_context(open_point(point, at_point, is_permanent=True))
            stack.enter_context(entry(switch.standing, hook, tap))
        yield


def noting_changes(look: Look, switch: BlockSwitch) -> Look:
    """`look`, which tells the switch when it replaces a tensor by another one."""

    def look_and_note(tensor: Tensor) -> Tensor | None:
        new = look(tensor)
        switch.changed |= new is not None and not torch.equal(new, tensor)
        return new

    return look_and_note


def free_tap(switch: BlockSwitch, point: HookPoint) -> Tap | None:
    """The tap of a hook point; None if it has none, or if a hook stands there that is for another hook point.

    Nothing would tell which of the two comes first in the model; in the block itself they are apart.
    """
    tap = switch.taps.get(point)
    if tap is None:
        return None
    others = (other for other in switch.standing.values() if other is not None and other is not tap)
    return None if any((other.part, other.is_input) == (tap.part, tap.is_input) for other in others) else tap


@contextmanager
def lent_points(model: LanguageModel, hook: str, names: Sequence[str]) -> Iterator[dict[str, HookPoint]]:
    """New hook points by their `names`, which `model` has as "{hook}.{name}" in here, for its caches and for hooks.

    Points of the same names that were lent before are out of reach meanwhile.
    """
    points = {name: HookPoint() for name in names}
    known = known_points.setdefault(model, WeakValueDictionary())
    is_bridge = hasattr(model, "_hook_registry")
    registries = [known, model._hook_registry] if is_bridge else [known, model.hook_dict, model.mod_dict]
    host = vars(hook_point_of(model, hook))  # where a bridge's `add_hook` looks; not a module's part, which would count
    with ExitStack() as stack:
        for name, point in points.items():
            point.name = f"{hook}.{name}"
            for registry in registries:
                stack.enter_context(entry(registry, point.name, point))
            stack.enter_context(entry(host, name, point))
        yield points


@contextmanager
def entry(entries: MutableMapping[Any, Any], key: Any, value: Any) -> Iterator[None]:
    """In here `entries[key]` is `value`."""
    before = entries.get(key)
    entries[key] = value
    try:
        yield
    finally:
        entries.pop(key, None)
        if before is not None:
            entries[key] = before


@contextmanager
def shown_tokens(model: LanguageModel, look: Callable[[Tensor], None]) -> Iterator[None]:
    """In here every pass shows its token ids (prompts, positions) to `look`; one that starts at a layer has none."""

    def show(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(args[0] if args else next(iter(kwargs.values())))

    handle = model.embed.register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_hooks(model: LanguageModel) -> Iterator[None]:
    """In here no hook at a hook point or a tap is called. For a short pass that is to trouble nobody who placed one."""
    switches = [switch for block in model.blocks if (switch := switch_in(block)) is not None]
    parts = {*model.hook_dict.values(), *(tap.part for switch in switches for tap in switch.taps.values())}
    kept = [(hooks, hooks.copy()) for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, copies in kept:
            hooks.update(copies)
