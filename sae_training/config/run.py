"""The run config: one flat, inert description of everything a training run does.

Building it checks every value and nothing else: no disk, network, wandb or device is touched, and
nothing is printed. The text under each field is its only documentation; the command line prints it
as help. Numbers that follow from other fields are properties at the end of the class, so
`dataclasses.replace` always gives a consistent config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from sae_training.config.cache import CacheActivationsRunnerConfig
from sae_training.config.checks import checked_names, plain_values, refuse
from sae_training.config.rules import problems
from sae_training.config.sweep import is_several, listed_fields
from sae_training.config.types import FIXED_K, LABELS, Architecture, Dtype, OneOrMany, PrecisionName, SchedulerName

__all__ = ["Architecture", "CacheActivationsRunnerConfig", "Dtype", "LanguageModelSAERunnerConfig", "SchedulerName"]

# What "auto" means. The learning rate is
#     AUTO_LR / sqrt(d_sae / 2**14) / sqrt(max(1, steps / AUTO_LR_STEPS)), at most AUTO_LR_MAX:
# measured on SmolLM2, d_sae 4608, 500k rows in 122 to 976 steps (README, "What auto means"). At 100,000 steps it is
# the 2e-4 / sqrt(d_sae / 2**14) that sparsify and dictionary_learning use for their long runs.
AUTO_LR = 3.7e-3
AUTO_LR_STEPS = 250
AUTO_LR_MAX = 1e-2
AUTO_AUXK_COEFFICIENT: dict[str, float] = dict.fromkeys(FIXED_K, 1 / 4)
AUTO_WARM_UP_SHARE = 0.25
AUTO_WARM_UP_MAX_STEPS = 1000


@checked_names
@dataclass(kw_only=True)
class LanguageModelSAERunnerConfig:
    """Everything that one sparse autoencoder training run needs to know."""

    # Language model and the place in it

    model_name: str = "gelu-2l"
    """Language model: TransformerLens or Hugging Face name, local folder, or demo (built in)."""

    hook_point: OneOrMany[str] = "blocks.0.hook_mlp_out"
    """Hook whose activations are encoded; `{layer}` in it is replaced by hook_point_layer."""

    hook_point_layer: OneOrMany[int | Literal["all"]] = 0
    """Layer for `{layer}` in hook_point, or all; else the layer is read from the hook's name."""

    layer_stride: int = 1
    """With hook_point_layer all: every n-th layer, from layer 0."""

    hook_point_head_index: int | None = None
    """Attention head to take from a hook with a head axis; None takes all heads, concatenated."""

    d_in: int | None = 512
    """Width of the activations; None takes it from the model."""

    target_hook_point: str | None = None
    """Hook whose activations a transcoder predicts from those at hook_point; None: its own."""

    d_out: int | None = None
    """Width of the target's activations; None takes it from the model."""

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
    """Split of the dataset to train on."""

    dataset_text_column: str | None = None
    """Column that holds the text, in each of several datasets; None finds it."""

    is_dataset_tokenized: bool | None = True
    """Whether the dataset holds token ids. The columns decide in any case; None says so."""

    streaming: bool | None = None
    """Read the dataset as a stream; None does so from the hub and not from local files."""

    eval_dataset_path: str | None = None
    """Dataset for evaluation; None holds out a part of the training dataset."""

    context_size: int = 128
    """Tokens per context, the BOS token included."""

    prepend_bos: bool = True
    """Start each context with BOS, and with sequence_separator_token auto each document."""

    sequence_separator_token: Literal["auto", "bos", "eos", "sep", "none"] | int = "auto"
    """Token between two documents, by name or id; auto is BOS with prepend_bos, else none."""

    exclude_special_tokens: bool = False
    """Leave the activations at special tokens (BOS, EOS, padding) out of training."""

    seqpos_slice: tuple[int, ...] = ()
    """Positions of a context to train on: start, stop and perhaps step, as in a Python slice."""

    max_activation_norm_multiple: float | None = None
    """Leave out activations longer than this multiple of the median, say 10; None keeps all."""

    # Autoencoder

    architecture: OneOrMany[Architecture] = "standard"
    """standard is ReLU with L1, topk keeps the k largest; all are in architectures.py."""

    expansion_factor: OneOrMany[int] = 4
    """Latents per input dimension: d_sae = d_in * expansion_factor."""

    k: OneOrMany[int] = 32
    """Active latents per token (topk, batchtopk, matryoshka)."""

    k_anneal_steps: int = 0
    """Steps over which the active latents fall linearly from min(d_sae / 2, 8k) to k."""

    multi_topk: bool = False
    """Add the reconstruction from 4k latents to the loss at weight 1/8 (topk)."""

    matryoshka_widths: tuple[int, ...] = ()
    """Sizes of the nested dictionaries, ascending (matryoshka); () is d_sae / 16, / 8, / 4, / 2."""

    matryoshka_selection: Literal["batchtopk", "topk"] = "batchtopk"
    """How matryoshka chooses its active latents."""

    jumprelu_bandwidth: float = 0.05
    """Width of the kernel of jumprelu's straight-through estimators."""

    jumprelu_init_threshold: float = 0.1
    """Threshold that all latents of jumprelu start with, in units of the (scaled) activations."""

    skip_connection: bool = False
    """Add a linear map of the input to a transcoder's output (starts at zero)."""

    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    """Starting value of the decoder bias, from the first buffer of activations."""

    normalize_activations: Literal["none", "expected_average_only_in", "layer_norm", "unit_norm"] = "none"
    """Size of activations: by one factor to a mean norm of sqrt(d_in), or each row to that norm by itself."""

    from_pretrained_path: str | None = None
    """Saved autoencoder whose weights training starts from; None starts fresh."""

    dtype: Dtype = cast("Dtype", "float32")
    """Precision of the autoencoder's weights: float32, bfloat16, float16 or float64."""

    encoder_matmul_dtype: PrecisionName = "auto"
    """Precision in which training chooses latents; auto is bfloat16 where that is fast."""

    # Loss and dead latents

    l1_coefficient: OneOrMany[float] = 1e-3
    """Weight of the sparsity penalty (standard and gated: L1, jumprelu: L0)."""

    l1_warm_up_steps: int = 0
    """Steps over which the weight of the sparsity penalty rises linearly from 0."""

    lp_norm: float = 1.0
    """Power of the activations in the penalty: 1 is L1 (standard, gated)."""

    scale_sparsity_penalty_by_decoder_norm: bool = False
    """Penalise activation times decoder norm, and leave the decoder's norms free."""

    target_l0: float | None = None
    """L0 that jumprelu aims at, by the penalty (L0 / target_l0 - 1)^2; None penalises L0 itself."""

    jumprelu_sparsity_loss_mode: Literal["step", "tanh"] = "step"
    """Penalty of jumprelu: step is L0, tanh the sum of tanh(jumprelu_tanh_scale * activation)."""

    jumprelu_tanh_scale: float = 4.0
    """Steepness of the tanh penalty."""

    auxk_coefficient: float | Literal["auto"] = 0.0
    """Weight of the AuxK loss for dead latents; auto is 1/4 with a fixed k, else 0."""

    auxk_k: int | None = None
    """Dead latents per token that the AuxK loss uses; None is the power of two near d_in / 2."""

    use_ghost_grads: bool = False
    """Revive dead latents with ghost gradients."""

    feature_sampling_method: Literal["anthropic", "l2"] | None = None
    """Resample dead latents at the end of each feature_sampling_window in the run's first half."""

    feature_sampling_window: int = 2000
    """Steps over which firing frequencies are counted; resampling comes at the end of each."""

    dead_feature_window: int = 1000
    """Steps without firing after which a latent counts as dead."""

    dead_feature_window_tokens: int | None = None
    """The same in tokens; if set it is used in place of dead_feature_window."""

    dead_feature_threshold: float = 1e-8
    """Frequency below which sparsity/below_dead_feature_threshold counts a latent."""

    # Training

    total_training_tokens: int = 2_000_000
    """Tokens to train on; the run has total_training_tokens // tokens_per_step steps."""

    train_batch_size: int = 4096
    """Activations (tokens) per training step; at most half of the buffer."""

    lr: OneOrMany[float | Literal["auto"]] = 3e-4
    """Learning rate; auto is the rule that we measured to be best, by d_sae and steps."""

    lr_scheduler_name: SchedulerName = "constantwithwarmup"
    """Course of the learning rate."""

    lr_warm_up_steps: OneOrMany[int | Literal["auto"]] = 500
    """Steps of linear warm-up, in schedulers with one; auto is a quarter of the run up to 1000."""

    lr_decay_steps: int = 0
    """Steps at the end over which the learning rate falls linearly to 0."""

    lr_end: float | None = None
    """Learning rate at the end of a cosine; None is lr / 10."""

    n_restart_cycles: int = 1
    """Cycles of cosineannealingwarmrestarts."""

    optimizer: Literal["adam", "adam8bit", "signum"] = "adam"
    """Optimizer; adam8bit keeps its moments in 8 bits and needs the extra of that name."""

    adam_beta1: float = 0.9
    """Decay of the mean of gradients, per step (adam and signum)."""

    adam_beta2: float = 0.999
    """Decay of Adam's mean of squared gradients, per step."""

    clip_grad_norm: float | None = None
    """Largest norm of the gradient; None does not clip."""

    ema_decay: float | None = None
    """Decay per step of a moving average of the weights, which the run then ends with."""

    grad_acc_steps: int = 1
    """Batches of train_batch_size that make up one optimizer step, one after the other."""

    micro_batch_size: int | None = None
    """Activations that go through the autoencoder at a time; None is train_batch_size."""

    # Buffer of activations

    store_batch_size: int = 32
    """Contexts per forward pass of the language model."""

    n_batches_in_buffer: int = 20
    """Forward passes that fill the shuffling buffer: more mixes better and takes memory."""

    use_cached_activations: bool | Literal["then_live"] = False
    """Train on activations from disk; at their end start them again, or go on live."""

    cached_activations_path: str | None = None
    """Folder that `sae-training cache` wrote; read only with use_cached_activations."""

    # Evaluation

    n_eval_batches: int = 10
    """Batches of store_batch_size contexts held out for evaluation; 0 holds out none."""

    eval_every_steps: int | None = None
    """Steps between evaluations; None is 10 x wandb_log_frequency, 0 turns all evaluation off."""

    # Logging

    log_to_wandb: bool = True
    """Mirror the metrics to Weights & Biases; the run folder has them in any case."""

    wandb_project: str = "mats_sae_training_language_model"
    """Project on Weights & Biases."""

    wandb_entity: str | None = None
    """User or team on Weights & Biases; None is your default."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of Weights & Biases; None is online if a key is there, else offline."""

    wandb_log_frequency: int = 10
    """Steps between logged rows."""

    # Run folder and checkpoints

    run_name: str | None = None
    """Name of the run and of its folder; None makes one from the sizes."""

    run_dir: str = "runs"
    """Folder that holds the run folders."""

    checkpoint_path: str | None = None
    """Old name of run_dir."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto goes on with an unfinished run of this name and config; must fails without one."""

    checkpoint_every_steps: int | None = None
    """Steps between resumable checkpoints; None saves by time alone."""

    checkpoint_every_minutes: float | None = 15
    """Minutes between resumable checkpoints; None saves by steps alone."""

    keep_checkpoints: int = 2
    """Resumable checkpoints kept; older ones are deleted."""

    n_checkpoints: int = 0
    """Evenly spaced snapshots of the weights over the run, all kept."""

    # Machine

    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    tokenizer_processes: int | None = None
    """Processes that tokenise ahead; 0 is a thread, None is 1 on a CPU and 4 with a GPU."""

    seed: OneOrMany[int] = 42
    """Seed of the starting weights; the order of the activations is the same for all seeds."""

    parallel: Literal["data", "layers", "latents"] = "data"
    """How several processes share the work under torchrun (this version: data)."""

    def __post_init__(self) -> None:
        for name, value in plain_values(self).items():
            setattr(self, name, value)
        refuse(type(self), problems(self))
        # Here and not at the top: `--help` reads this file, and torch takes over a second.
        import torch

        self.dtype = getattr(torch, str(self.dtype))

    # Sizes

    @property
    def d_sae(self) -> int | None:
        """Number of latents; None while d_in is not known."""
        return None if self.d_in is None else self.d_in * self.expansion_factor

    @property
    def total_training_steps(self) -> int:
        """Optimizer steps of the whole run; a last partial batch is not trained on."""
        return self.total_training_tokens // self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Activations between two optimizer steps."""
        return self.train_batch_size * self.grad_acc_steps

    @property
    def buffer_rows(self) -> int:
        """Activations in the full shuffling buffer."""
        return self.n_batches_in_buffer * self.store_batch_size * self.context_size

    @property
    def tokens_per_buffer(self) -> int:
        """The same as buffer_rows, under its name of the mats era."""
        return self.buffer_rows

    # Names

    @property
    def resolved_hook_point(self) -> str:
        """hook_point with its layer filled in."""
        return self.hook_point.replace("{layer}", str(self.hook_point_layer))

    @property
    def resolved_target_hook_point(self) -> str | None:
        """target_hook_point with its layer filled in."""
        return self.target_hook_point and self.target_hook_point.replace("{layer}", str(self.hook_point_layer))

    @property
    def resolved_run_name(self) -> str:
        """run_name, or the name that mats made from the sizes; `4x` stands for an unknown d_sae."""
        if self.run_name is not None:
            return self.run_name
        if is_several(self):
            labels = [LABELS[name].strip("-") or name for name in listed_fields(self)] or ["layer"]
            return f"sweep-{'-'.join(labels)}-Tokens-{self.total_training_tokens:3.3e}"
        width = f"{self.expansion_factor}x" if self.d_sae is None else self.d_sae
        sparsity = f"K-{self.k}" if self.architecture in FIXED_K else f"L1-{self.l1_coefficient}"
        lr = self.lr if self.d_sae is None else f"{self.resolved_lr:.3g}" if self.lr == "auto" else self.lr
        return f"{width}-{sparsity}-LR-{lr}-Tokens-{self.total_training_tokens:3.3e}"

    @property
    def resolved_run_dir(self) -> str:
        """run_dir, or checkpoint_path where the old name was used."""
        return self.run_dir if self.checkpoint_path is None else self.checkpoint_path

    # Schedules and coefficients

    @property
    def resolved_lr(self) -> float:
        """lr, with "auto" replaced by its rule (which needs d_in)."""
        return auto_lr(self.d_sae, self.total_training_steps) if self.lr == "auto" else self.lr

    @property
    def resolved_lr_warm_up_steps(self) -> int:
        """lr_warm_up_steps, with "auto" replaced by its rule."""
        if self.lr_warm_up_steps == "auto":
            return auto_lr_warm_up_steps(self.total_training_steps)
        return self.lr_warm_up_steps

    @property
    def lr_end_value(self) -> float:
        """Learning rate at the end of a cosine."""
        return self.resolved_lr / 10 if self.lr_end is None else self.lr_end

    @property
    def resolved_auxk_coefficient(self) -> float:
        """auxk_coefficient, with "auto" replaced by its rule."""
        if self.auxk_coefficient == "auto":
            return AUTO_AUXK_COEFFICIENT.get(self.architecture, 0.0)
        return self.auxk_coefficient

    @property
    def resolved_auxk_k(self) -> int:
        """auxk_k, or its rule (which needs d_in); never more than d_sae."""
        if self.auxk_k is not None:
            return self.auxk_k
        if self.d_in is None:
            raise ValueError(_needs_d_in("auxk_k", None))
        return min(auto_auxk_k(self.d_out or self.d_in), self.d_in * self.expansion_factor)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; 0 for none."""
        if self.eval_every_steps is None:
            return 10 * self.wandb_log_frequency
        return self.eval_every_steps


def auto_lr(d_sae: int | None, total_steps: int) -> float:
    """Learning rate that "auto" stands for."""
    if d_sae is None:
        raise ValueError(_needs_d_in("lr", "auto"))
    return min(AUTO_LR_MAX, AUTO_LR / math.sqrt(d_sae / 2**14 * max(1.0, total_steps / AUTO_LR_STEPS)))


def auto_lr_warm_up_steps(total_steps: int) -> int:
    """Warm-up that "auto" stands for."""
    return min(AUTO_WARM_UP_MAX_STEPS, int(AUTO_WARM_UP_SHARE * total_steps))


def auto_auxk_k(d_in: int) -> int:
    """Power of two nearest to d_in / 2 on a log scale: 512 for 768, as in Gao et al. 2024."""
    return 2 ** round(math.log2(max(1, d_in / 2)))


def _needs_d_in(field: str, value: str | None) -> str:
    return (
        f"{field}: found {value!r} with d_in None, expected a known d_in to work it out; "
        "set d_in, or load the model first and replace d_in by its width"
    )
