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

EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


def layer_of(hook_point: str) -> int | None:
    """The block that a name of either kind names, or None."""
    found = BLOCK.search(hook_point)
    return int(found[1]) if found else None


def transformer_lens_name(name: str) -> str:
    """The hook that has the output of a module of transformers: model.layers.3 is blocks.3.hook_resid_post.

    Names of other kinds stay as they are. (In models with a norm after the MLP, such as Gemma 2, TransformerLens'
    hook_mlp_out comes after that norm, the module's output before it: `mlp` keeps its name there only if it is given.)
    """
    path = re.sub(r"^(?:model|transformer|gpt_neox|language_model)\.", "", name)
    if path in EMBEDDINGS:
        return "hook_embed"
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if found is None or (found[2] or "") not in OUTPUTS:
        return name
    return f"blocks.{found[1]}.{OUTPUTS[found[2] or '']}"
