"""The groups of fields that configs are composed of; nothing is checked or worked out here.

    Source         the language model, the place in it, the text, the passes     runs and caches
    Autoencoder    one autoencoder, its loss, its dead latents                    runs and toy runs
    Optimisation   how it is trained                                              runs and toy runs
    Records        logging, folder and machine                                    runs and toy runs
    Origin         what other programs' files say, and training has no use for    runs

A field stands in a group if all configs of that group honour it. The text under each field is its only documentation;
the command line prints it as help, so that it takes one line. What the marks in annotations mean is said in `types`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

from sae_training.config.checks import field_types, marks
from sae_training.config.types import (
    FIXED_K,
    Architecture,
    BelowOne,
    Device,
    Dtype,
    FolderName,
    IdentifiesCache,
    InProportion,
    NotNegative,
    OneOrMany,
    OnlyIn,
    OnlyWatches,
    Positive,
    PrecisionName,
    SchedulerName,
    Slice,
    Text,
    at_least,
)


@dataclass(kw_only=True)
class Source:
    """Where activations come from: a language model, places in it, and text."""

    RETIRED: ClassVar[dict[str, str]] = {
        "tokenizer_processes": "a thread tokenises ahead of the model; leave it out",
    }

    # Language model and the place in it

    model_name: IdentifiesCache[Text] = "gelu-2l"
    """Language model: TransformerLens or Hugging Face name, local folder, or demo (built in)."""

    hook_point: OneOrMany[Text] = "blocks.0.hook_mlp_out"
    """Hook whose activations are taken; `{layer}` in it is replaced by hook_point_layer."""

    hook_point_layer: OneOrMany[NotNegative[int] | Literal["all"]] = 0
    """Layer for `{layer}` in hook_point, or all; else the layer is read from the hook's name."""

    layer_stride: Positive[int] = 1
    """With hook_point_layer all: every n-th layer, from layer 0."""

    hook_point_head_index: IdentifiesCache[NotNegative[int] | None] = None
    """Attention head to take from a hook with a head axis; None takes all heads, concatenated."""

    lm_dtype: IdentifiesCache[PrecisionName] = "auto"
    """Precision of the frozen model; auto is bfloat16 where that is fast, else float32."""

    model_processing: IdentifiesCache[Literal["default", "none"]] = "default"
    """default: weights folded and centred by TransformerLens; none: as transformers has them."""

    device_map: OnlyWatches[str | dict[str, int | str] | None] = None
    """Where the model's parts lie: auto, balanced, cpu, or JSON by part; None is all on device."""

    load_in_8bit: IdentifiesCache[bool] = False
    """Load the model's linear layers in 8 bits (bitsandbytes), the rest in lm_dtype."""

    compile_lm: bool = False
    """Run the frozen model through torch.compile; takes a minute, and needs a C++ compiler."""

    # Text

    dataset_path: IdentifiesCache[Text | list[Text]] = "NeelNanda/c4-tokenized-2b"
    """Hugging Face name, .txt/.jsonl/.csv/.parquet file or folder, or demo; a list is mixed."""

    dataset_weights: IdentifiesCache[tuple[Positive[float], ...]] = ()
    """Shares of documents of a mixture; () is equal ones. The first to run out ends an epoch."""

    dataset_split: IdentifiesCache[Text] = "train"
    """Split of the dataset to read."""

    dataset_text_column: IdentifiesCache[str | None] = None
    """Column of text, token ids or conversations, in each of several datasets; None finds it."""

    on_bad_rows: OnlyWatches[Literal["error", "skip"]] = "error"
    """At a row of another type than its column's: error stops, skip leaves it out and counts it."""

    streaming: bool | None = None
    """Read the dataset as a stream; None does so from the hub and not from local files."""

    context_size: IdentifiesCache[Annotated[int, at_least(2)]] = 128
    """Tokens per context, the BOS token included."""

    prepend_bos: IdentifiesCache[bool] = True
    """Start each context with BOS, and with sequence_separator_token auto each document."""

    sequence_separator_token: IdentifiesCache[Literal["auto", "bos", "eos", "sep", "none"] | NotNegative[int]] = "auto"
    """Token between two documents, by name or id; auto is BOS with prepend_bos, else none."""

    pack_sequences: IdentifiesCache[bool] = True
    """False: one document a context, padded, never joined; the rest of a long one gets the next."""

    exclude_special_tokens: IdentifiesCache[bool] = False
    """Leave out the activations at special tokens (BOS, EOS, padding)."""

    seqpos_slice: IdentifiesCache[Slice] = ()
    """Positions of a context to keep, as in a Python slice: 1: or -1: (the last) or 0,64,2."""

    max_activation_norm_multiple: IdentifiesCache[Annotated[float, at_least(1)] | None] = None
    """Leave out activations longer than this multiple of the median, say 10; None keeps all."""

    # Passes of the language model

    store_batch_size: Positive[int] = 32
    """Contexts per forward pass of the language model."""

    n_eval_batches: NotNegative[int] = InProportion(10)
    """Held-out batches of store_batch_size contexts; if not given, fewer than 10 in short runs."""


@dataclass(kw_only=True)
class Autoencoder:
    """One sparse autoencoder: its architecture, its loss, and what is done about dead latents."""

    # Autoencoder

    architecture: OneOrMany[Architecture] = "standard"
    """standard is ReLU with L1, topk keeps the k largest; all are in architectures.py."""

    k: OneOrMany[Positive[int]] = 32
    """Active latents per token (topk, batchtopk, matryoshka)."""

    k_anneal_steps: Annotated[NotNegative[int], OnlyIn(*FIXED_K)] = 0
    """Steps over which the active latents fall linearly from min(d_sae / 2, 8k) to k."""

    multi_topk: Annotated[bool, OnlyIn("topk")] = False
    """Add the reconstruction from 4k latents to the loss at weight 1/8 (topk)."""

    matryoshka_widths: Annotated[tuple[Positive[int], ...], OnlyIn("matryoshka")] = ()
    """Sizes of the nested dictionaries, ascending (matryoshka); () is d_sae / 16, / 8, / 4, / 2."""

    matryoshka_selection: Literal["batchtopk", "topk"] = "batchtopk"
    """How matryoshka chooses its active latents."""

    jumprelu_bandwidth: Annotated[Positive[float], OnlyIn("jumprelu")] = 0.05
    """Width of the kernel of jumprelu's straight-through estimators."""

    jumprelu_init_threshold: Annotated[Positive[float], OnlyIn("jumprelu")] = 0.1
    """Threshold that all latents of jumprelu start with, in units of the (scaled) activations."""

    jumprelu_init_l0: Annotated[Positive[float] | Literal["auto"] | None, OnlyIn("jumprelu")] = "auto"
    """L0 that the first thresholds give; None, or a set jumprelu_init_threshold: that threshold."""

    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    """Starting value of the decoder bias, from the first buffer of activations."""

    dtype: Dtype = cast("Dtype", "float32")
    """Precision of a step: float32, bfloat16 or float64; weights stay float32 at least."""

    encoder_matmul_dtype: PrecisionName = "auto"
    """Precision in which training chooses latents; auto is bfloat16 where that is fast."""

    seed: OneOrMany[NotNegative[int]] = 42
    """Seed of the starting weights; the order of the activations is the same for all seeds."""

    # Loss and dead latents

    l1_coefficient: OneOrMany[NotNegative[float]] = 1e-3
    """Weight of the sparsity penalty (standard and gated: L1, jumprelu: L0)."""

    l1_warm_up_steps: NotNegative[int] = 0
    """Steps over which the weight of the sparsity penalty rises linearly from 0."""

    lp_norm: Annotated[Positive[float], OnlyIn("standard", "gated")] = 1.0
    """Power of the activations in the penalty: 1 is L1 (standard, gated)."""

    scale_sparsity_penalty_by_decoder_norm: Annotated[bool, OnlyIn("standard", "gated", "jumprelu")] = False
    """Penalise activation times decoder norm, and leave the decoder's norms free."""

    target_l0: Annotated[Positive[float] | None, OnlyIn("jumprelu")] = None
    """L0 that thresholds are steered to, and penalty (L0 / target_l0 - 1)^2; None penalises L0."""

    jumprelu_sparsity_loss_mode: Annotated[Literal["step", "tanh"], OnlyIn("jumprelu")] = "step"
    """Penalty of jumprelu: step is L0, tanh the sum of tanh(jumprelu_tanh_scale * activation)."""

    jumprelu_tanh_scale: Annotated[Positive[float], OnlyIn("jumprelu")] = 4.0
    """Steepness of the tanh penalty."""

    auxk_coefficient: NotNegative[float] | Literal["auto"] = 0.0
    """Weight of the AuxK loss for dead latents; auto is 1/4 with a fixed k, else 0."""

    auxk_k: Positive[int] | None = None
    """Dead latents per token that the AuxK loss uses; None is the power of two near d_in / 2."""

    use_ghost_grads: bool = False
    """Revive dead latents with ghost gradients."""

    feature_sampling_window: Positive[int] = 2000
    """Steps over which firing frequencies are counted; resampling comes at the end of each."""

    dead_feature_window: Positive[int] = 1000
    """Steps without firing after which a latent counts as dead."""

    dead_feature_window_tokens: Positive[int] | None = None
    """The same in tokens; if set it is used in place of dead_feature_window."""


@dataclass(kw_only=True)
class Optimisation:
    """How an autoencoder is trained: for how long, in which batches, by which optimizer."""

    # Training

    total_training_tokens: Positive[int] = 2_000_000
    """Tokens to train on; the run has total_training_tokens // tokens_per_step steps."""

    train_batch_size: Positive[int] = 4096
    """Activations (tokens) per training step; at most half of the buffer."""

    micro_batch_size: Positive[int] | None = None
    """Activations that go through the autoencoder at a time; None is train_batch_size."""

    lr: OneOrMany[Positive[float] | Literal["auto"]] = 3e-4
    """Learning rate; auto is the rule that we measured to be best, by d_sae and steps."""

    lr_scheduler_name: SchedulerName = "constantwithwarmup"
    """Course of the learning rate."""

    lr_warm_up_steps: OneOrMany[NotNegative[int] | Literal["auto"]] = 500
    """Steps of linear warm-up, in schedulers with one; auto is a quarter of the run up to 1000."""

    lr_decay_steps: NotNegative[int] = 0
    """Steps at the end over which the learning rate falls linearly to 0."""

    lr_end: NotNegative[float] | None = None
    """Learning rate at the end of a cosine; None is lr / 10."""

    n_restart_cycles: Positive[int] = 1
    """Cycles of cosineannealingwarmrestarts."""

    optimizer: Literal["adam", "adam8bit", "signum"] = "adam"
    """Optimizer; adam8bit keeps its moments in 8 bits and needs the extra of that name."""

    adam_beta1: BelowOne[float] = 0.9
    """Decay of the mean of gradients, per step (adam and signum)."""

    adam_beta2: BelowOne[float] = 0.999
    """Decay of Adam's mean of squared gradients, per step."""

    clip_grad_norm: Positive[float] | None = None
    """Largest norm of the gradient; None does not clip."""

    ema_decay: BelowOne[float] | None = None
    """Decay per step of a moving average of the weights, which the run then ends with."""


@dataclass(kw_only=True)
class Records:
    """What is kept of a training run and where it runs; none of it changes the weights."""

    # Logging

    log_to_wandb: OnlyWatches[bool] = True
    """Mirror the metrics to Weights & Biases; the run folder has them in any case."""

    wandb_project: OnlyWatches[str] = "mats_sae_training_language_model"
    """Project on Weights & Biases."""

    wandb_entity: OnlyWatches[str | None] = None
    """User or team on Weights & Biases; None is your default."""

    wandb_mode: OnlyWatches[Literal["online", "offline", "disabled"] | None] = None
    """Mode of Weights & Biases; None is online if a key is there, else offline."""

    wandb_log_frequency: OnlyWatches[Positive[int]] = 10
    """Steps between logged rows."""

    # Run folder and machine

    run_name: OnlyWatches[FolderName | None] = None
    """Name of the run and of its folder; None makes one from the sizes."""

    run_dir: OnlyWatches[Text] = "runs"
    """Folder that holds the run folders."""

    device: OnlyWatches[Device] = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""


@dataclass(kw_only=True)
class Origin:
    """What the files of other programs say of an autoencoder; training takes nothing but the defaults."""

    # Origin of a loaded autoencoder

    file_format: str | None = None
    """Format of the files that an autoencoder was loaded from; None: it was trained here."""

    file_dtype: str | None = None
    """Precision of the weights in these files; None: it was trained here."""

    apply_b_dec_to_input: bool = True
    """Subtract the decoder's bias from an autoencoder's input (never from a transcoder's)."""

    activation_fn: Annotated[Literal["relu", "tanh-relu"], OnlyIn("standard")] = "relu"
    """Activation of the pre-activations above 0: themselves, or their tanh (standard)."""

    residual_threshold: Annotated[NotNegative[float], OnlyIn("matching_pursuit")] = 1e-2
    """Norm of the residual below which no more latents are chosen (matching_pursuit)."""

    max_iterations: Annotated[Positive[int] | None, OnlyIn("matching_pursuit")] = None
    """Most latents that are chosen one after the other; None is d_in (matching_pursuit)."""

    stop_on_duplicate_support: Annotated[bool, OnlyIn("matching_pursuit")] = True
    """Choose no more latents after one that was chosen before (matching_pursuit)."""


OPTION_OF: dict[str, tuple[str, ...]] = {
    name: mark.architectures
    for name, hint in (field_types(Autoencoder) | field_types(Origin)).items()
    for mark in marks(hint)
    if isinstance(mark, OnlyIn)
}
"""The fields that only some architectures have, with these."""
