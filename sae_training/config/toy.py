"""The config of a toy run: a known dictionary, the data it makes, and the autoencoder that should find it.

Inert like the run config, and checked in the same way. A field that is declared here again has another default than
in a language model's run, or takes no list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from sae_training.config.checks import checked_names
from sae_training.config.fields import Autoencoder, Optimisation, Records
from sae_training.config.rules import check
from sae_training.config.types import (
    Architecture,
    NotNegative,
    OnlyWatches,
    Positive,
    SchedulerName,
    UpToOne,
    ZeroToOne,
    at_least,
    torch_dtype,
)


@checked_names
@dataclass(kw_only=True)
class SAEToyModelRunnerConfig(Records, Optimisation, Autoencoder):
    """Everything that one training run on synthetic data needs to know."""

    RETIRED: ClassVar[dict[str, str]] = {
        "sae": "its values are now fields of their own, and were taken as these: jumprelu_init_threshold=0.5, not "
        'sae={"jumprelu_init_threshold": 0.5}',
    }

    # Where the rows of a toy autoencoder came from, under the names that its saved config has.
    model_name: ClassVar[str] = "toy-model"
    hook_point: ClassVar[str] = "rows"
    dataset_path: ClassVar[str] = "toy-model"

    # The dictionary

    n_features: Positive[int] = 512
    """True features."""

    n_hidden: Positive[int] = 128
    """Dimensions that the features share: the width of the rows."""

    max_cosine: UpToOne[float] | None = None
    """Spread the directions until no |cosine| is above this; None leaves them random."""

    # When features fire, and how strongly

    feature_probability: UpToOne[float] = 0.0125
    """Mean share of rows on which a feature fires: n_features times this fire per row."""

    frequencies: Literal["zipf", "uniform"] = "zipf"
    """zipf: feature i fires in proportion to 1 / (i + 1) ** zipf_exponent; uniform: all alike."""

    zipf_exponent: NotNegative[float] = 0.5
    """How unequal the frequencies are; 0 is uniform."""

    magnitudes: Literal["one_plus_normal", "uniform"] = "one_plus_normal"
    """Activation of a firing feature: 1 + |standard normal|, or uniform from 0 to 1 (as in mats)."""

    n_parents: NotNegative[int] = 0
    """Features (the first ones) that have children, which fire only where their parent does."""

    children_per_parent: Positive[int] = 2
    """Children of each parent; they are the features that follow the parents."""

    child_probability: UpToOne[float] = 0.3
    """Share of its parent's rows on which a child fires."""

    n_correlated_groups: NotNegative[int] = 0
    """Groups of features that tend to fire together; they follow the children."""

    correlated_group_size: Annotated[int, at_least(2)] = 2
    """Features in each such group."""

    correlation: ZeroToOne[float] = 0.8
    """Correlation in a group of the normals whose tails decide firing; 1: all or none fire."""

    n_anticorrelated_pairs: NotNegative[int] = 0
    """Pairs of features that never fire together; they follow the groups."""

    bias_norm: NotNegative[float] = 0.0
    """Norm of a vector in a random direction that is added to every row."""

    noise_std: NotNegative[float] = 0.0
    """Standard deviation of the normal noise on every element of a row."""

    # Autoencoder

    architecture: Architecture = "topk"
    """Any architecture of the run config; standard is ReLU with L1, topk keeps the k largest."""

    d_sae: Positive[int] = 1024
    """Latents; a multiple of n_hidden."""

    k: Positive[int] = 6
    """Active latents per row (topk, batchtopk, matryoshka)."""

    l1_coefficient: NotNegative[float] = 1.5e-3
    """Weight of the sparsity penalty (standard and gated: L1, jumprelu: L0)."""

    l1_warm_up_steps: NotNegative[int] = 500
    """Steps over which the weight of the sparsity penalty rises linearly from 0."""

    auxk_coefficient: NotNegative[float] | Literal["auto"] = "auto"
    """Weight of the AuxK loss for dead latents; auto is 1/4 with a fixed k, else 0."""

    feature_sampling_window: Positive[int] = 1000
    """Steps over which firing frequencies are counted before they start anew."""

    dead_feature_window: Positive[int] = 100
    """Steps without firing after which a latent counts as dead."""

    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = "zeros"
    """Starting value of the decoder bias; zeros is right for data without a bias."""

    # Training

    total_training_tokens: Positive[int] = 768_000
    """Rows to train on; all are drawn afresh."""

    train_batch_size: Positive[int] = 512
    """Rows per training step."""

    lr: Positive[float] | Literal["auto"] = 1e-2
    """Learning rate; auto is the rule of the run config, made for language models."""

    lr_scheduler_name: SchedulerName = "linearwarmupdecay"
    """Course of the learning rate."""

    lr_warm_up_steps: NotNegative[int] | Literal["auto"] = 50
    """Steps of linear warm-up; auto is a quarter of the run, at most 1000."""

    n_eval_rows: Positive[int] = 16_384
    """Rows, not trained on, over which the scores that need firings are taken."""

    # Logging and machine

    log_to_wandb: OnlyWatches[bool] = False
    """Mirror the metrics to Weights & Biases; the run folder has them in any case."""

    wandb_project: OnlyWatches[str] = "mats_sae_training_toy_model"
    """Project on Weights & Biases."""

    wandb_log_frequency: OnlyWatches[Positive[int]] = 50
    """Steps between logged rows."""

    seed: NotNegative[int] = 42
    """Seed of the dictionary, the data and the weights."""

    def __post_init__(self) -> None:
        """Check every field; ValueError with all problems at once."""
        check(self, (width_not_a_multiple, too_few_features, closer_than_possible))
        self.dtype = torch_dtype(self.dtype)

    @property
    def d_in(self) -> int:
        """n_hidden, under its name in the run config."""
        return self.n_hidden

    @property
    def store_batch_size(self) -> int:
        """Rows that are drawn at a time, under their name in the run config."""
        return self.train_batch_size

    @property
    def total_training_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_training_tokens // self.train_batch_size

    @property
    def mean_active_features(self) -> float:
        """Features that fire on a row, on average."""
        return self.n_features * self.feature_probability

    @property
    def resolved_run_name(self) -> str:
        """run_name, or one from the sizes."""
        return self.run_name or f"toy-{self.architecture}-{self.d_sae}-for-{self.n_features}-in-{self.n_hidden}"


# ------------------------------------------------------------------------------------------------ rules, as in `rules`


def width_not_a_multiple(d_sae: int, n_hidden: int) -> str | None:
    """Refuse a dictionary that is not a whole number of times as wide as the rows."""
    if d_sae % n_hidden == 0:
        return None
    above = -(-d_sae // n_hidden) * n_hidden
    return f"d_sae: found {d_sae}, expected a multiple of n_hidden = {n_hidden}; {above} is the next"


def too_few_features(
    n_features: int,
    n_parents: int,
    children_per_parent: int,
    n_correlated_groups: int,
    correlated_group_size: int,
    n_anticorrelated_pairs: int,
) -> str | None:
    """Refuse families, groups and pairs that need more features than there are."""
    families = n_parents * (1 + children_per_parent)
    needed = families + n_correlated_groups * correlated_group_size + 2 * n_anticorrelated_pairs
    if needed <= n_features:
        return None
    return (
        f"n_features: found {n_features}, expected at least the {needed} that parents with children, correlated "
        "groups and anticorrelated pairs take; raise it or lower those"
    )


def closer_than_possible(max_cosine: float | None, n_features: int, n_hidden: int) -> str | None:
    """Refuse directions that would have to be further apart than there is room.

    The largest |cosine| between n unit vectors in d dimensions is at least sqrt((n - d) / (d (n - 1))) (Welch 1974).
    """
    n, d = n_features, n_hidden
    bound = math.sqrt(max(0, n - d) / (d * max(1, n - 1)))
    if max_cosine is None or max_cosine > bound:
        return None
    return (
        f"max_cosine: found {max_cosine}, expected more than {bound:.3f}, below which no {n} directions in {d} "
        "dimensions stay; raise it or leave it out"
    )
