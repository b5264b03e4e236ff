"""The config of writing activations to disk; its fields are those of the run config, but for what only a cache has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_training.config.checks import checked_names, plain_values, refuse, value_problems
from sae_training.config.rules import weights_without_datasets
from sae_training.config.types import OneOrMany, PrecisionName


@checked_names
@dataclass(kw_only=True)
class CacheActivationsRunnerConfig:
    """Everything that one cache of activations needs to know."""

    # Language model and the places in it

    model_name: str = "gelu-2l"
    """Language model: TransformerLens or Hugging Face name, local folder, or demo (built in)."""

    hook_point: OneOrMany[str] = "blocks.0.hook_mlp_out"
    """Hooks whose activations are written, all from one pass; `{layer}` is replaced by hook_point_layer."""

    hook_point_layer: OneOrMany[int | Literal["all"]] = 0
    """Layers for `{layer}` in hook_point, or all."""

    layer_stride: int = 1
    """With hook_point_layer all: every n-th layer, from layer 0."""

    hook_point_head_index: int | None = None
    """Attention head to take from a hook with a head axis; None takes all heads, concatenated."""

    lm_dtype: PrecisionName = "auto"
    """Precision of the frozen model; auto is bfloat16 where that is fast, else float32."""

    compile_lm: bool = False
    """Run the frozen model through torch.compile; takes a minute, and needs a C++ compiler."""

    # Text

    dataset_path: str | list[str] = "NeelNanda/c4-tokenized-2b"
    """Hugging Face name, .txt/.jsonl/.parquet file or folder, or demo; a list is mixed."""

    dataset_weights: tuple[float, ...] = ()
    """Shares of documents of a mixture; () is equal ones. The first to run out ends an epoch."""

    dataset_split: str = "train"
    """Split of the dataset."""

    dataset_text_column: str | None = None
    """Column that holds the text, in each of several datasets; None finds it."""

    streaming: bool | None = None
    """Read the dataset as a stream; None does so from the hub and not from local files."""

    context_size: int = 128
    """Tokens per context, the BOS token included."""

    prepend_bos: bool = True
    """Start each context with BOS, and with sequence_separator_token auto each document."""

    sequence_separator_token: Literal["auto", "bos", "eos", "sep", "none"] | int = "auto"
    """Token between two documents, by name or id; auto is BOS with prepend_bos, else none."""

    exclude_special_tokens: bool = False
    """Leave the activations at special tokens (BOS, EOS, padding) out of the rows."""

    seqpos_slice: tuple[int, ...] = ()
    """Positions of a context to keep in the rows: start, stop and perhaps step, as in a Python slice."""

    max_activation_norm_multiple: float | None = None
    """Leave out activations longer than this multiple of the median, say 10; None keeps all."""

    store_batch_size: int = 32
    """Contexts per forward pass of the language model."""

    n_eval_batches: int = 10
    """Batches of contexts that are held out, as in the runs that will train on the cache; not written."""

    # Cache

    cached_activations_path: str = "activations"
    """Folder to write; an unfinished one of the same config is continued."""

    total_training_tokens: int = 2_000_000
    """Tokens that go through the model, in whole passes; those excluded as special are not written."""

    form: Literal["rows", "contexts", "both"] = "rows"
    """rows: shuffled over the whole cache, for training. contexts: in the order of the text, for analysis."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Precision on disk; auto is that of the model, which loses nothing; int8 has a scale for each row."""

    shard_size_mb: int = 256
    """Size of a file, about; writing holds up to three of them in memory."""

    seed: int = 42
    """Seed of the shuffle."""

    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    tokenizer_processes: int | None = None
    """Processes that tokenise ahead; 0 is a thread, None is 1 on a CPU and 4 with a GPU."""

    def __post_init__(self) -> None:
        for name, value in plain_values(self).items():
            setattr(self, name, value)
        found = value_problems(plain_values(self), type(self))
        if not found.keys() & {"dataset_weights", "dataset_path"} and (line := weights_without_datasets(self)):
            found["dataset_weights"] = line
        refuse(type(self), list(found.values()))
