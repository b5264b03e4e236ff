"""The hook that stands for a module of transformers has what the module puts out, in real models of many families."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import D_HEAD, D_IN, VOCAB
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_training.demo_data import DEMO_MODEL
from sae_training.formats.hook_names import transformer_lens_name
from sae_training.language_model.load import load_language_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_IN,
    "num_hidden_layers": 2,
    "num_attention_heads": D_IN // D_HEAD,
    "num_key_value_heads": D_IN // D_HEAD,
    "head_dim": D_HEAD,
    "intermediate_size": 2 * D_IN,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}

NOT_ADDED = {
    "olmo2": "OLMo-2-1124-7B",
    "olmo3": "Olmo-3-7B-Think",
    "glm4": "GLM-Z1-9B-0414",
    "gemma2": "shieldgemma-2b",
    "gemma3_text": "medgemma-4b-it",
    "exaone4": "EXAONE-4.0-1.2B",
    "bloom": "bloomz-560m",
}
"""Families in which something is done to a module's output before it is added, and the name of one of them."""

ADDED = {"llama": "Llama-3.2-1B", "gemma": "codegemma-2b", "glm": "glm-4-9b-hf", "gpt_neox": "pythia-70m"}


@pytest.mark.parametrize(("family", "name"), [*NOT_ADDED.items(), *ADDED.items()])
def test_the_hook_of_a_module_has_what_the_module_puts_out(family: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | ({"partial_rotary_factor": 0.5} if family.startswith("glm") else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for parameter_name, parameter in model.named_parameters():
        if re.search("norm|ln_", parameter_name):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / name)
    put_out: dict[str, Any] = {}
    for place, module in model.named_modules():
        if re.search(r"\.1\.(mlp|self_attn|attn|attention)$", place):
            module.register_forward_hook(lambda _, __, out, at=place: put_out.update({at: out}))
    tokens = torch.randint(1, VOCAB, (2, 9))
    with torch.no_grad():
        model(tokens)

    hooks = {place: transformer_lens_name(place, str(tmp_path / name)) for place in put_out}
    as_added = ["blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"]
    hooked = load_language_model(str(tmp_path / name), "cpu", "float32", "none", list(hooks.values()))
    with torch.no_grad():
        _, cache = hooked.run_with_cache(tokens, names_filter=[*hooks.values(), *as_added])
    assert len(hooks) == (1 if family == "bloom" else 2)
    for place, hook in hooks.items():
        out = put_out[place][0] if isinstance(put_out[place], tuple) else put_out[place]
        added = as_added["mlp" not in place]
        off, off_as_added = ((cache[at] - out).abs().max() / out.abs().max() for at in (hook, added))
        assert off < 1e-4
        assert (off_as_added < 1e-4) == (family in ADDED), f"{added} of {name}"
