"""Finds where else the tensor of a hook point passes: into or out of some part of the plain Hugging Face block.

TransformerLens puts a hook point at every place of interest and computes a block so that each tensor passes one. The
plain block (`twins.py`) has no hook points, but the same tensors pass through it: `hook_mlp_out` is what its MLP
returns, `attn.hook_z` what its output projection reads. Such a place is a `Tap`. `find_taps` runs both blocks on the
same tokens and keeps the taps that show the same tensor as the hook point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

Look = Callable[[Tensor], Tensor | None]
"""A function that is shown a tensor as its hook point has it. If it returns a tensor, this takes the other's place."""

SAME = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative distance; roundings alone give 1e-6
SAME_IN_16_BITS = 2e-2


@dataclass(frozen=True)
class Tap:
    """The input or the output of a part of a block."""

    part: nn.Module
    is_input: bool
    conversion: Any
    """Converts the part's tensor to the hook point's shape (heads apart, say) and back; None: they are the same."""

    @contextmanager
    def open(self, look: Look) -> Iterator[None]:
        """In here `look` is called at every pass."""
        if self.is_input:
            handle = self.part.register_forward_pre_hook(partial(self._on_input, look), with_kwargs=True)
        else:
            handle = self.part.register_forward_hook(partial(self._on_output, look))
        try:
            yield
        finally:
            handle.remove()

    def _on_input(self, look: Look, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = self._show(look, args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        new = self._show(look, kwargs[name])
        return None if new is None else (args, kwargs | {name: new})

    def _on_output(self, look: Look, part: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not isinstance(out, tuple):
            return self._show(look, out)
        new = self._show(look, out[0])
        return None if new is None else (new, *out[1:])

    def _show(self, look: Look, tensor: Tensor) -> Tensor | None:
        if self.conversion is None:
            return look(tensor)
        new = look(self.conversion.convert(tensor))
        return None if new is None else self.conversion.revert(new)


@contextmanager
def open_point(point: HookPoint, look: Look, is_permanent: bool = False) -> Iterator[int]:
    """In here `look` is called whenever a pass comes to the hook point. Yield the id that torch gives the hook.

    A hook that `is_permanent` stays when somebody calls `reset_hooks`.
    """
    point.add_hook(lambda tensor, hook: look(tensor), is_permanent=is_permanent)
    added = point.fwd_hooks[-1]
    try:
        yield added.hook.id
    finally:
        added.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not added]


# ----------------------------------------------------------------------------------------------------------- finding


def candidate_taps(copies: Mapping[nn.Module, nn.Module]) -> dict[HookPoint, list[Tap]]:
    """For each hook point of a part: the input and output of that part's copy. `copies` maps parts to their copies."""
    candidates: dict[HookPoint, list[Tap]] = {}
    for part, copy in copies.items():
        for name, point in part._modules.items():
            if isinstance(point, HookPoint):
                sides = {"hook_in": [True], "hook_out": [False]}.get(name, [False, True])
                conversion = getattr(point, "hook_conversion", None)
                candidates[point] = [Tap(copy, is_input, conversion) for is_input in sides]
    return candidates


def find_taps(
    candidates: Mapping[HookPoint, list[Tap]], hooked: Callable[[], Any], plain: Callable[[], Any]
) -> dict[HookPoint, Tap]:
    """For each hook point, the first of its candidates that shows the same tensor when `plain` runs as the hook point
    does when `hooked` runs. Rounding may differ. In 16 bits no comparison is sure enough, and there are no taps.
    """
    taps = dict.fromkeys(tap for of_point in candidates.values() for tap in of_point)
    at_points = run_open(((point, partial(open_point, point)) for point in candidates), hooked)
    at_taps = run_open(((tap, tap.open) for tap in taps), plain)
    found: dict[HookPoint, Tap] = {}
    for point, expected in at_points.items():
        agreeing = [tap for tap in candidates[point] if tap in at_taps and is_surely_same(at_taps[tap], expected)]
        if agreeing:
            found[point] = agreeing[0]
    return found


def run_open(places: Iterable[tuple[Any, Callable[[Look], Any]]], run: Callable[[], Any]) -> dict[Any, Tensor]:
    """The tensors that pass some places while `run` runs, by the key of each place."""
    seen: dict[Any, Tensor] = {}

    def note(key: Any) -> Look:
        return lambda tensor: seen.update({key: tensor})

    with ExitStack() as stack:
        for key, open_place in places:
            stack.enter_context(open_place(note(key)))
        run()
    return seen


def is_surely_same(found: Tensor, expected: Tensor) -> bool:
    return expected.dtype in SAME and found.shape == expected.shape and is_close(found, expected)


def is_close(found: Any, expected: Any) -> bool:
    """Whether two outputs of a block (a tensor, or a tuple with it first) are equal but for rounding."""
    found, expected = (value[0] if isinstance(value, tuple) else value for value in (found, expected))
    limit = SAME.get(expected.dtype, SAME_IN_16_BITS)
    return bool((found - expected).float().norm() <= limit * expected.float().norm())
