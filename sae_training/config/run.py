"""The run config: one flat, inert description of everything a training run does.

Building it checks every value and nothing else: no disk, network, wandb or device is touched, and nothing is printed.
Numbers that follow from other fields are properties, so that `dataclasses.replace` always gives a consistent config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_training.config import auto
from sae_training.config.checks import checked_names
from sae_training.config.fields import Autoencoder, Optimisation, Origin, Records, Source
from sae_training.config.rules import check
from sae_training.config.sweep import is_several, listed_fields, variants
from sae_training.config.types import (
    FIXED_K,
    LABELS,
    InProportion,
    Normalization,
    NotNegative,
    OneOrMany,
    OnlyWatches,
    Positive,
    Text,
    torch_dtype,
)


# The fields of a dataclass begin with those of its last base.
@checked_names
@dataclass(kw_only=True)
class LanguageModelSAERunnerConfig(Origin, Records, Optimisation, Autoencoder, Source):
    """Everything that one sparse autoencoder training run needs to know."""

    # Widths and places

    d_in: Positive[int] | None = 512
    """Width of the activations; None takes it from the model."""

    target_hook_point: Text | None = None
    """Hook whose activations a transcoder predicts from those at hook_point; None: its own."""

    d_out: Positive[int] | None = None
    """Width of the target's activations; None takes it from the model."""

    expansion_factor: OneOrMany[Positive[int]] = 4
    """Latents per input dimension: d_sae = d_in * expansion_factor."""

    n_latents: Positive[int] | None = None
    """Latents, in place of expansion_factor: d_sae = n_latents; None is d_in * expansion_factor."""

    skip_connection: bool = False
    """Add a linear map of the input to a transcoder's output (starts at zero)."""

    normalize_activations: Normalization = "none"
    """Size of activations: by one factor to a mean norm of sqrt(d_in), or each row to that norm by itself."""

    from_pretrained_path: str | None = None
    """Saved autoencoder whose weights training starts from; None starts fresh."""

    # Text and buffer of activations

    is_dataset_tokenized: bool | None = True
    """Whether the dataset holds token ids. The columns decide in any case; None says so."""

    eval_dataset_path: str | None = None
    """Dataset for evaluation; None holds out a part of the training dataset."""

    n_batches_in_buffer: Positive[int] = InProportion(20)
    """Forward passes that fill the shuffling buffer; if not given, fewer than 20 in short runs."""

    use_cached_activations: bool | Literal["then_live"] = False
    """Train on activations from disk; at their end start them again, or go on live."""

    cached_activations_path: str | None = None
    """Folder that `sae-training cache` wrote; read only with use_cached_activations."""

    # Training on several machines, and in parts

    grad_acc_steps: Positive[int] = 1
    """Batches of train_batch_size that make up one optimizer step, one after the other."""

    parallel: OnlyWatches[Literal["data", "layers", "latents", "data,latents"]] = "data"
    """What processes share: data (a batch's rows), layers (autoencoders), latents, or two."""

    mesh: OnlyWatches[tuple[Positive[int], ...]] = ()
    """Of data,latents: groups, which share rows, by processes of a group: 2,4 for 8 in all."""

    parallel_timeout_minutes: OnlyWatches[Positive[float]] = 30
    """How long a process waits for the others, to come and in each step."""

    # Dead latents and evaluation

    feature_sampling_method: Literal["anthropic", "l2"] | None = None
    """Resample dead latents at the end of each feature_sampling_window in the run's first half."""

    dead_feature_threshold: NotNegative[float] = 1e-8
    """Frequency below which sparsity/below_dead_feature_threshold counts a latent."""

    eval_every_steps: OnlyWatches[NotNegative[int] | None] = None
    """Steps between evaluations; None is 10 x wandb_log_frequency, 0 turns all evaluation off."""

    # Checkpoints

    checkpoint_path: OnlyWatches[str | None] = None
    """Old name of run_dir."""

    resume: OnlyWatches[Literal["auto", "never", "must"]] = "auto"
    """auto goes on with an unfinished run of this name and config; must fails without one."""

    checkpoint_every_steps: OnlyWatches[Positive[int] | None] = None
    """Steps between resumable checkpoints; None saves by time alone."""

    checkpoint_every_minutes: OnlyWatches[Positive[float] | None] = 15
    """Minutes between resumable checkpoints; None saves by steps alone."""

    grace_seconds: OnlyWatches[Positive[float] | None] = None
    """Seconds from SIGTERM until the machine kills the process, for the last checkpoint."""

    keep_checkpoints: OnlyWatches[Positive[int]] = 2
    """Resumable checkpoints kept; older ones are deleted."""

    n_checkpoints: OnlyWatches[NotNegative[int]] = 0
    """Evenly spaced snapshots of the weights over the run, all kept."""

    def __post_init__(self) -> None:
        """Check every field; ValueError with all problems at once."""
        for name in auto.IN_PROPORTION:
            if isinstance(getattr(self, name), InProportion):
                setattr(self, name, getattr(type(self), name))  # from the default, if it was worked out before
        check(self)
        self.dtype = torch_dtype(self.dtype)
        rows, of_a_pass = self.total_training_steps * self.tokens_per_step, self.store_batch_size * self.context_size
        if isinstance(self.n_batches_in_buffer, InProportion):
            n = self.n_batches_in_buffer
            self.n_batches_in_buffer = auto.batches_in_buffer(n, rows, of_a_pass, self.tokens_per_step)
        if isinstance(self.n_eval_batches, InProportion):  # asked first, because a sweep's passes take long to count
            n = self.n_eval_batches
            self.n_eval_batches = auto.eval_batches(n, rows // of_a_pass, self.passes_of_an_eval_batch)

    # Sizes

    @property
    def d_sae(self) -> int | None:
        """Number of latents; None while d_in is not known."""
        if self.n_latents is not None:
            return self.n_latents
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

    @property
    def passes_of_an_eval_batch(self) -> int:
        """Passes of the language model that evaluate a batch: clean, ablated at each hook, spliced for each SAE."""
        singles = variants(self).values()
        targets = {single.resolved_target_hook_point or single.resolved_hook_point for single in singles}
        return 1 + len(targets) + len(singles)

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
        return auto.auto_lr(self.d_sae, self.total_training_steps) if self.lr == "auto" else self.lr

    @property
    def resolved_lr_warm_up_steps(self) -> int:
        """lr_warm_up_steps, with "auto" replaced by its rule."""
        given = self.lr_warm_up_steps
        return auto.auto_lr_warm_up_steps(self.total_training_steps) if given == "auto" else given

    @property
    def lr_end_value(self) -> float:
        """Learning rate at the end of a cosine."""
        return self.resolved_lr / 10 if self.lr_end is None else self.lr_end

    @property
    def resolved_auxk_coefficient(self) -> float:
        """auxk_coefficient, with "auto" replaced by its rule."""
        given = self.auxk_coefficient
        return auto.auto_auxk_coefficient(self.architecture) if given == "auto" else given

    @property
    def resolved_auxk_k(self) -> int:
        """auxk_k, or its rule (which needs d_in); never more than d_sae."""
        if self.auxk_k is not None:
            return self.auxk_k
        if self.d_in is None:
            raise ValueError(auto.needs_d_in("auxk_k", None))
        return min(auto.auto_auxk_k(self.d_out or self.d_in), self.d_sae or self.d_in * self.expansion_factor)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; 0 for none."""
        if self.eval_every_steps is None:
            return 10 * self.wandb_log_frequency
        return self.eval_every_steps
