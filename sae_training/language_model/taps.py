"""Where else in the language model the tensor of a hook point passes: on the way into or out of a part of a block.

transformer_lens puts a hook point at every place of interest, and computes a block so that each tensor passes one. The
plain Hugging Face block (the twin of `blocks.py`) is faster and has none; but `hook_mlp_out` is what its MLP returns,
`attn.hook_z` what its output projection reads, and so on. `find_taps` tells by running both on the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HookPoint = Any  # only language_model.py imports transformer_lens
Look = Callable[[Tensor], Tensor | None]
"""Sees a tensor as transformer_lens shows it; what it returns takes the tensor's place, unless it is None."""

SAME = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative distance; roundings come to 1e-6
SAME_IN_16_BITS = 2e-2
LEVEL = -1  # of our hooks at hook points, by which they are removed again and no others


@dataclass(frozen=True)
class Tap:
    part: nn.Module
    is_input: bool
    conversion: Any
    """Between the part's tensor and what the hook point shows of it (heads apart, say); None: the same."""

    @contextmanager
    def open(self, look: Look) -> Iterator[None]:
        """In here `look` is called at every pass."""
        if self.is_input:
            handle = self.part.register_forward_pre_hook(functools.partial(self._on_input, look), with_kwargs=True)
        else:
            handle = self.part.register_forward_hook(functools.partial(self._on_output, look))
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
def open_point(point: HookPoint, look: Look) -> Iterator[None]:
    """In here `look` is called at every pass that comes to the hook point."""
    point.add_hook(lambda activations, hook: look(activations), level=LEVEL)
    try:
        yield
    finally:
        point.remove_hooks(dir="fwd", level=LEVEL)


# ----------------------------------------------------------------------------------------------------------- finding


def candidate_taps(copies: Mapping[nn.Module, nn.Module]) -> dict[HookPoint, list[Tap]]:
    """Of each hook point in a part: what goes into the copy that `copies` gives of that part, or comes out of it."""
    found: dict[HookPoint, list[Tap]] = {}
    for part, copy in copies.items():
        for name, point in part._modules.items():
            if hasattr(point, "fwd_hooks"):
                ways = {"hook_in": [True], "hook_out": [False]}.get(name, [False, True])
                found[point] = [Tap(copy, is_input, getattr(point, "hook_conversion", None)) for is_input in ways]
    return found


def find_taps(
    candidates: Mapping[HookPoint, list[Tap]], hooked: Callable[[], Any], tapped: Callable[[], Any]
) -> dict[HookPoint, Tap]:
    """For each hook point that `hooked` passes, the first of its candidates where `tapped` passes the same tensor,
    but for roundings. In 16 bits none is sure enough.
    """
    taps = dict.fromkeys(tap for of_point in candidates.values() for tap in of_point)
    at_points = run_open(((point, functools.partial(open_point, point)) for point in candidates), hooked)
    at_taps = run_open(((tap, tap.open) for tap in taps), tapped)
    found: dict[HookPoint, Tap] = {}
    for point, expected in at_points.items():
        agreeing = [tap for tap in candidates[point] if tap in at_taps and is_surely_same(at_taps[tap], expected)]
        if agreeing:
            found[point] = agreeing[0]
    return found


def run_open(places: Iterable[tuple[Any, Callable[[Look], Any]]], run: Callable[[], Any]) -> dict[Any, Tensor]:
    """The tensors that pass the places in a run, by the key of each."""
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
    found, expected = (value[0] if isinstance(value, tuple) else value for value in (found, expected))
    limit = SAME.get(expected.dtype, SAME_IN_16_BITS)
    return bool((found - expected).float().norm() <= limit * expected.float().norm())
