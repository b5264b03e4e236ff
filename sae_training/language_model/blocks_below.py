"""Passes of the frozen language model that begin where they differ from an earlier pass over the same prompts.

A pass with a replacement at a hook computes, below the hook, what the pass without has computed already. `BlocksBelow`
records the outputs of blocks in the clean pass. In a changed pass the blocks below the hook then return the recorded
output at once. This works for both model classes (a bridge cannot start at a layer), and leaves to them what comes
before the blocks: masks, and positions of rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from sae_training.language_model.hooks import block_number
from sae_training.language_model.load import LanguageModel

OUTPUTS = ("hook_resid_post", "hook_out")  # names of the hook point at a block's output


def n_blocks_below(names: Iterable[str]) -> int:
    """Return how many of the first blocks nothing at these hooks can change; 0 if one is outside the blocks."""
    return min((n_below(name) for name in names), default=0)


def n_below(name: str) -> int:
    layer = block_number(name)
    if layer is None:
        return 0
    return layer + (name.partition(f"blocks.{layer}.")[2] in OUTPUTS)


class BlocksBelow:
    """Outputs of the clean pass of `model`, for the changed passes that begin above the first `ns` blocks."""

    def __init__(self, model: LanguageModel, ns: Iterable[int]) -> None:
        self.model = model
        self.outputs: dict[int, Any] = dict.fromkeys(n for n in ns if n > 0)
        """What the first n blocks put out, by n."""

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """In here a pass records the outputs."""
        with ExitStack() as stack:
            for n in self.outputs:
                block = self.model.blocks[n - 1]
                point = output_point_inside(block)
                if point is None:
                    stack.enter_context(running(block, lambda forward, n=n: self.recorder(forward, n)))
                else:  # before the hooks of others there, which are called again when the output is replayed
                    hook = point.register_forward_pre_hook(lambda _, args, n=n: self.outputs.update({n: args[0]}))
                    stack.callback(hook.remove)
            yield

    def recorder(self, forward: Callable[..., Any], n: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self.outputs[n] = forward(*args, **kwargs)
            return self.outputs[n]

        return record

    @contextmanager
    def skipped(self, n: int) -> Iterator[None]:
        """In here a pass over the same prompts goes through the first `n` blocks without computing them."""
        with ExitStack() as stack:
            for i, block in enumerate(self.model.blocks[:n]):
                point = output_point_inside(block) if i == n - 1 else None
                stack.enter_context(running(block, lambda _, point=point: self.replayer(n, point)))
            yield

    def replayer(self, n: int, point: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
        def replay(*args: Any, **kwargs: Any) -> Any:
            output = copied(self.outputs[n])
            return output if point is None else point(output)

        return replay


def output_point_inside(block: Any) -> Any | None:
    """The hook point of a block's output in a HookedTransformer; None in a bridge, whose forward does not reach it."""
    return None if hasattr(block, "original_component") else block.hook_resid_post


def copied(output: Any) -> Any:
    """Return a block's output with a copy of its tensor, because what comes after may write into it."""
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()


@contextmanager
def running(block: Any, replaced: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """In here `replaced(forward)` runs in place of the forward of a block, of a bridge's within its hook points."""
    layer = getattr(block, "original_component", block)
    forward = layer.forward
    own = vars(layer).get("forward")
    # Not by setattr, which TransformerLens passes on to what it wraps; and with the signature, which the bridge reads.
    vars(layer)["forward"] = wraps(forward)(replaced(forward))
    try:
        yield
    finally:
        del vars(layer)["forward"]
        if own is not None:
            vars(layer)["forward"] = own
