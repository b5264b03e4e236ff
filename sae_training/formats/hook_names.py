"""Names of places in a language model: the layer in them, and TransformerLens names for those of transformers."""

from __future__ import annotations

import re

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?|h)[._](\d+)(?:\.|$)")

OUTPUTS = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
    "attn": "hook_attn_out",
}
"""Modules in a block of transformers, and the hook that has the module's output."""

NORMS_AFTER_MODULES = re.compile(r"gemma-?[234](?![\db])")  # gemma-2-2b and gemma-3-1b, but not gemma-2b
"""Models whose blocks have a norm after attention and MLP."""

BEFORE_NORM = {"hook_mlp_out": "mlp.hook_out", "hook_attn_out": "attn.hook_out"}

EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


def layer_of(hook_point: str) -> int | None:
    """The block that a name of either kind names, or None."""
    found = BLOCK.search(hook_point)
    return int(found[1]) if found else None


def transformer_lens_name(name: str, model_name: str | None = None) -> str:
    """The hook that has the output of a module of transformers: model.layers.3 is blocks.3.hook_resid_post.

    Names of other kinds stay as they are. In a model with a norm after the module (Gemma 2 and later), hook_mlp_out and
    hook_attn_out have what comes after that norm, and the module's output is mlp.hook_out or attn.hook_out.
    """
    path = re.sub(r"^(?:model|transformer|gpt_neox|language_model)\.", "", name)
    if path in EMBEDDINGS:
        return "hook_embed"
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if found is None or (found[2] or "") not in OUTPUTS:
        return name
    return f"blocks.{found[1]}.{output_of_module(OUTPUTS[found[2] or ''], model_name)}"


def output_of_module(hook: str, model_name: str | None) -> str:
    """hook_mlp_out or hook_attn_out, or in a model with a norm after it the hook before that norm."""
    has_norm_after = model_name is not None and NORMS_AFTER_MODULES.search(model_name.lower()) is not None
    return BEFORE_NORM.get(hook, hook) if has_norm_after else hook
