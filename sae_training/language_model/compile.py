"""Sends the blocks of the frozen language model through torch.compile (`compile_lm`), for training rows only.

Evaluations and probes come with tokens of other shapes, each of which would be compiled anew. What is compiled is a
second twin of a block, which never has hooks, because torch.compile would not notice hooks that are added later
(`torch._dynamo.config.skip_nnmodule_hook_guards`).
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae_training.language_model.load import LanguageModel
from sae_training.language_model.twins import BlockSwitch, Forward, on_its_device, skip_hook_points, switch_in, twin_of
from sae_training.machine.errors import first_line

COMPILED_FORMS = 64  # of a block, by its kind and by the shape of the tokens; torch's own limit is 8


class CompilationFailed(ValueError):
    """The model cannot be compiled on this machine; nothing was trained."""


def compile_blocks(model: LanguageModel, wanted: bool) -> None:
    """Let the blocks of `model` run compiled inside `compiled_blocks`, or (False) no longer.

    It changes `model` in place. Each shape of tokens is compiled at its first pass, which takes some 10 s on a CPU;
    blocks of one kind share the code. Raise ValueError if no block can be compiled.
    """
    if not wanted:
        for block in model.blocks:
            if (switch := switch_in(block)) is not None:
                switch.compiled = None
        return
    if hasattr(model, "original_model") and not any(map(switch_in, model.blocks)):  # a bridge that we did not load
        skip_hook_points(model)
    # Not dynamic: the code for a shape, and its roundings, would depend on which shapes came before it.
    compiled = torch.compile(run_block, dynamic=False, fullgraph=True, options={"deterministic": True})
    if not any([compile_block(block, compiled) for block in model.blocks]):
        raise ValueError(
            "compile_lm: found True with a model whose blocks cannot run without their hook points, expected one with "
            "something to compile; set compile_lm to False."
        )


def compile_block(block: Any, compiled: Forward) -> bool:
    """Give the switch of `block` a compiled twin; False if the block can have none."""
    is_bridge = hasattr(block, "original_component")
    twin = twin_of(block.original_component if is_bridge else block, {})
    if twin is None:
        return False
    forward: Forward = partial(compile_and_run, compiled, twin)
    if is_bridge:
        forward = on_its_device(forward, block.original_component)
    else:  # but a block of a HookedTransformer, which gets a switch only here
        first, last = block.hook_resid_pre, block.hook_resid_post
        if "forward" not in vars(block):
            plain = between(first, last, twin)
            vars(block)["forward"] = BlockSwitch(block, block.forward, plain, {}, [first, last])
        forward = between(first, last, forward)
    switch = switch_in(block)
    if switch is None:
        return False
    switch.compiled = forward
    return True


def between(first: nn.Module, last: nn.Module, forward: Forward) -> Forward:
    """`forward` with the hook points of the residual stream around it, which its twin has lost."""

    def run(residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        return last(forward(first(residual), *args, **kwargs))

    return run


def run_block(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return twin(*args, **kwargs)


def compile_and_run(compiled: Forward, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a twin through `compiled`; raise CompilationFailed with one sentence, because torch's errors have hundreds of
    lines.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=COMPILED_FORMS):
            return compiled(twin, *args, **kwargs)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        raise CompilationFailed(
            f"compile_lm: found True, but {type(twin).__name__} could not be compiled on this machine "
            f"({type(error).__name__}: {first_line(error)}). Install a C++ compiler (g++) if there is none, or set "
            "compile_lm to False; TORCHDYNAMO_VERBOSE=1 shows more."
        ) from (error if os.environ.get("TORCHDYNAMO_VERBOSE") == "1" else None)
