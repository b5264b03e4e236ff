"""The sizes of a language model by its config alone, for plans: no weights are read.

`sizes_of` asks config.json of a local folder, then TransformerLens' table of names, then the config of a Hugging Face
name. Widths and blocks of a hook follow from its name, as in TransformerLens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sae_training.demo_data import bundled_model
from sae_training.language_model.hooks import block_number
from sae_training.language_model.load import official_name, quiet_loading
from sae_training.language_model.sites import cheapest_read
from sae_training.machine.errors import first_line
from sae_training.machine.precision import dtype_name

NOT_GATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "mpt", "codegen", "gpt_bigcode")
"""Families of which an MLP has two matrices; the others' have three."""

D_HEAD = 128  # of a model of which only the width is given
D_MLP = 4  # times d_model, likewise
D_VOCAB = 128_000


@dataclass(frozen=True)
class LanguageModelSizes:
    """Sizes of a language model, under the names that its `cfg` has for them."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_vocab: int
    block_params: int
    """Weights of one block."""
    n_params: int
    """Weights of all blocks, the embedding and the unembedding."""
    dtype: torch.dtype = torch.bfloat16
    in_8_bits: bool = False
    """Whether the weights of the blocks are, with `dtype` for the rest."""

    @property
    def bytes(self) -> int:
        of_blocks = self.n_layers * self.block_params
        itemsize = 1 if self.in_8_bits else self.dtype.itemsize
        return of_blocks * itemsize + (self.n_params - of_blocks) * self.dtype.itemsize

    @property
    def precision(self) -> str:
        return f"{'8 bits and ' if self.in_8_bits else ''}{dtype_name(self.dtype)}"

    def flops(self, n_blocks: int, context_size: int) -> float:
        """Return the operations of a pass, per token, through the first `n_blocks` blocks.

        2 * block_params + 2 * context_size * n_heads * d_head for each block: two for each weight; scores and the sum
        of values take 4 for each pair of a query and a key, half of which are masked.
        """
        return n_blocks * (2 * self.block_params + 2 * context_size * self.n_heads * self.d_head)


def sizes_of(name: str, given: dict[str, int | None], dtype: torch.dtype, processed: bool = True) -> LanguageModelSizes:
    """Return the sizes of the model that `load_language_model` loads by this name; `given` wins over what is found.

    `given` has the names of the sizes. A `processed` model has an unembedding of its own, whatever its config says.
    FileNotFoundError if there is no config and too little is given.
    """
    said = {field: value for field, value in given.items() if value is not None}
    if {"d_model", "n_layers"} <= said.keys() and {"d_mlp", "n_params"} & said.keys():
        return filled(said, dtype)
    found = found_sizes(bundled_model(name), name) | ({"tied": False} if processed else {})
    return filled(found | said, dtype)


def found_sizes(source: str, name: str) -> dict[str, Any]:
    """Return the sizes that a config says. TransformerLens' table has no network's part in it for Llama and Gemma."""
    official = official_name(source)
    listed = official is not None and any(family in official.lower() for family in ("llama", "gemma"))
    if listed and not Path(source).exists():
        try:
            from transformer_lens.loading_from_pretrained import convert_hf_model_config
        except ImportError:  # TransformerLens 4
            pass
        else:
            cfg = convert_hf_model_config(str(official))
            names = ("n_layers", "d_model", "d_mlp", "n_heads", "n_key_value_heads", "d_head", "d_vocab")
            return {key: cfg[key] for key in names if cfg.get(key)} | {"gated": cfg.get("gated_mlp", False)}
    try:
        with quiet_loading():
            cfg = AutoConfig.from_pretrained(official or source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model_name: found {name!r}, of which no sizes are known here ({first_line(error)}), expected a folder "
            "with config.json, demo, a Llama or Gemma, or a name whose config is in the Hugging Face cache; check it, "
            "or give --d_model, --n_layers and --n_params."
        ) from error
    return of_transformers(getattr(cfg, "text_config", cfg), name)


def of_transformers(cfg: Any, name: str) -> dict[str, Any]:
    """Return the sizes that a config of transformers has."""
    if getattr(cfg, "num_local_experts", None) or getattr(cfg, "num_experts", None):
        raise ValueError(
            f"model_name: found {name!r}, a mixture of experts, whose passes use a part of the weights, expected a "
            "dense model; give --d_model, --n_layers and --n_params (of the weights that a token uses)."
        )
    found = {
        "n_layers": cfg.num_hidden_layers,
        "d_model": cfg.hidden_size,
        "d_mlp": getattr(cfg, "intermediate_size", None) or getattr(cfg, "n_inner", None),
        "n_heads": cfg.num_attention_heads,
        "n_key_value_heads": getattr(cfg, "num_key_value_heads", None),
        "d_head": getattr(cfg, "head_dim", None),
        "d_vocab": cfg.vocab_size,
    }
    known = {key: value for key, value in found.items() if value}
    tied = bool(getattr(cfg, "tie_word_embeddings", False))
    return known | {"gated": cfg.model_type not in NOT_GATED, "tied": tied}


def filled(said: dict[str, Any], dtype: torch.dtype) -> LanguageModelSizes:
    """Return sizes of which some are said, with those that follow, or are usual, for the others.

    block_params = d_model * d_head * 2 * (n_heads + n_key_value_heads) + (3 if gated else 2) * d_model * d_mlp
    n_params     = n_layers * block_params + d_vocab * d_model, twice unless the unembedding is the embedding

    If n_params is said, a block has its share of what the embeddings leave. ValueError if that is nothing.
    """
    d_model, n_layers = said["d_model"], said["n_layers"]
    n_heads = said.get("n_heads") or max(1, d_model // said.get("d_head", D_HEAD))
    d_head, n_kv = said.get("d_head") or d_model // n_heads, said.get("n_key_value_heads") or n_heads
    d_mlp, d_vocab = said.get("d_mlp") or D_MLP * d_model, said.get("d_vocab") or D_VOCAB
    block = d_model * d_head * 2 * (n_heads + n_kv) + (3 if said.get("gated") else 2) * d_model * d_mlp
    embeddings = d_vocab * d_model * (1 if said.get("tied") else 2)
    n_params = said.get("n_params") or n_layers * block + embeddings
    if "n_params" in said:
        block = (n_params - embeddings) // n_layers
    if block <= 0:
        raise ValueError(
            f"n_params: found {n_params:,}, expected more than the {embeddings:,} of the embeddings (d_vocab "
            f"{d_vocab:,} x d_model {d_model:,} each); correct it, or give --d_vocab"
        )
    return LanguageModelSizes(n_layers, d_model, d_mlp, n_heads, n_kv, d_head, d_vocab, block, n_params, dtype)


# ----------------------------------------------------------------------------------------------------------- hooks


def width_of(hook: str, lm: LanguageModelSizes, head_index: int | None = None) -> int | None:
    """Return the width of the activations at a hook of TransformerLens' names; None for one whose name is not known."""
    last = hook.rpartition(".")[2]
    if last in ("hook_q", "hook_z", "hook_rot_q"):
        return lm.d_head if head_index is not None else lm.n_heads * lm.d_head
    if last in ("hook_k", "hook_v", "hook_rot_k"):
        return lm.d_head if head_index is not None else lm.n_key_value_heads * lm.d_head
    if ".mlp." in hook and last in ("hook_pre", "hook_post", "hook_pre_linear"):
        return lm.d_mlp
    ends = (
        "hook_embed",
        "hook_pos_embed",
        "hook_normalized",
        "hook_mlp_in",
        "hook_mlp_out",
        "hook_attn_out",
        "hook_in",
    )
    return lm.d_model if last.startswith("hook_resid") or last in (*ends, "hook_out") else None


def check_layer(hook: str, lm: LanguageModelSizes) -> None:
    """Raise ValueError for a hook of a block that the model does not have."""
    layer = block_number(hook)
    if layer is not None and layer >= lm.n_layers:
        raise ValueError(
            f"hook_point: {hook} names block {layer}, but this model has {lm.n_layers}; choose a layer from 0 to "
            f"{lm.n_layers - 1}."
        )


def blocks_run(hooks: list[str], lm: LanguageModelSizes) -> int:
    """Return how many blocks a pass runs that reads all the hooks, and stops after the last."""
    stops = [cheapest_read(hook)[1] for hook in hooks]
    return max(lm.n_layers if stop is None else stop for stop in stops)
