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

NOT_WHAT_IS_ADDED = re.compile(
    r"gemma|olmo[-_ ]?(?:[23]|hybrid)|flex[-_]?olmo|molmo|glm[-_]?(?:[4z]|ocr|image)|exaone[-_]?4|trinity|afmoe|"
    r"hyperclova|ouro|lfm[-_]?3|kolibri|beam-\d|muse-(?:glimmer|spark)|inkling|bloom"
)
"""Models whose blocks have a norm after attention and MLP (in Bloom: whose modules add the residual stream themselves).

By parts of names, as the files hold nothing else. A model that is taken for one by mistake loses nothing: its
mlp.hook_out has the same values as its hook_mlp_out.
"""

FIRST_GEMMA = re.compile(r"(?:^|[^a-z]|code)gemma[-_ ]?(?:1[.]|2b|7b)")
"""gemma-2b and codegemma-7b, but not gemma-2-2b, medgemma-4b (a Gemma 3) or shieldgemma-2b (a Gemma 2)."""

OF_MODULES = {"hook_mlp_out": "mlp.hook_out", "hook_attn_out": "attn.hook_out"}

EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


def layer_of(hook_point: str) -> int | None:
    """The block that a name of either kind names, or None."""
    found = BLOCK.search(hook_point)
    return int(found[1]) if found else None


def transformer_lens_name(name: str, model_name: str | None = None) -> str:
    """The hook that has the output of a module of transformers: model.layers.3 is blocks.3.hook_resid_post.

    Names of other kinds stay as they are. In a model with a norm after the module (Gemma 2, OLMo 2, GLM-4-0414 and
    later), hook_mlp_out and hook_attn_out have what comes after that norm, which is added to the residual stream, and
    the module's output is mlp.hook_out or attn.hook_out.
    """
    path = re.sub(r"^(?:model|transformer|gpt_neox|language_model)\.", "", name)
    if path in EMBEDDINGS:
        return "hook_embed"
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if found is None or (found[2] or "") not in OUTPUTS:
        return name
    return f"blocks.{found[1]}.{output_of_module(OUTPUTS[found[2] or ''], model_name)}"


def output_of_module(hook: str, model_name: str | None) -> str:
    """hook_mlp_out or hook_attn_out, or in a model with a norm after the module the hook before that norm."""
    name = (model_name or "").lower()
    is_apart = NOT_WHAT_IS_ADDED.search(name) is not None and FIRST_GEMMA.search(name) is None
    return OF_MODULES.get(hook, hook) if is_apart else hook
