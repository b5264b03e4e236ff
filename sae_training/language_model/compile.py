"""TODO."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn

from sae_training.language_model.twins import (
    BlockSwitch,
    Forward,
    LanguageModel,
    set_forward,
    skip_hook_points,
    switch_in,
    twin_of,
)

COMPILED_FORMS = 64  # of a block, by its kind and by the shape of the tokens; torch's own limit is 8

# ------------------------------------------------------------------------------------------------------------- twins


class CompilationFailed(ValueError):
    """The model cannot be compiled here; nothing was trained."""


# --------------------------------------------------------------------------------------------------------- compiling


def compile_blocks(model: LanguageModel, wanted: bool) -> None:
    """Let the blocks of `model` run compiled inside `compiled_blocks`, or (False) no longer.

    It changes `model` in place. Each shape of tokens is compiled at its first pass, which takes some 10 s on a CPU;
    blocks of a kind share the code.
    """
    if not wanted:
        for module in model.modules():
            if isinstance(switch := vars(module).get("forward"), BlockSwitch):
                switch.compiled = None
        return
    if hasattr(model, "original_model") and not any(map(switch_in, model.blocks)):  # a bridge that we did not load
        skip_hook_points(model)
    switches = [switch for block in model.blocks if (switch := with_switch(block)) is not None]
    if not switches:
        raise ValueError(
            "compile_lm: found True with a model whose blocks cannot run without their hook points, expected one with "
            "something to compile; set compile_lm to False."
        )
    # Not dynamic: the code for a shape, and its roundings, would depend on which shapes came before it.
    compiled = torch.compile(run_block, dynamic=False, fullgraph=True, options={"deterministic": True})
    for switch in switches:
        switch.compiled = functools.partial(compile_and_run, compiled, switch.twin)


def with_switch(block: Any) -> BlockSwitch | None:
    """The switch in a block, put there if need be; None if it cannot have one."""
    if not hasattr(block, "original_component") and "forward" not in vars(block):  # of a HookedTransformer
        twin = twin_of(block)
        if twin is not None:
            first, last = block.hook_resid_pre, block.hook_resid_post
            set_forward(block, BlockSwitch(block, block.forward, twin, twin, [first, last], first, last))
    return switch_in(block)


def run_block(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return twin(*args, **kwargs)


def compile_and_run(compiled: Forward, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    try:
        with torch._dynamo.config.patch(recompile_limit=COMPILED_FORMS):
            return compiled(twin, *args, **kwargs)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        # Theirs have hundreds of lines.
        reason = next(filter(None, map(str.strip, str(error).splitlines())), "")
        raise CompilationFailed(
            f"compile_lm: found True, but {type(twin).__name__} could not be compiled on this machine "
            f"({type(error).__name__}: {reason}). Install a C++ compiler (g++) if there is none, or set compile_lm to "
            "False; TORCHDYNAMO_VERBOSE=1 shows more."
        ) from (error if os.environ.get("TORCHDYNAMO_VERBOSE") == "1" else None)
