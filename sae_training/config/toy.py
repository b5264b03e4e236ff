"""The config of a toy run: a known dictionary, the data it makes, and the autoencoder that should find it.

Inert like the main config, and checked in the same way. The text under each field is its only
documentation; the command line prints it as help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from sae_training.config.checks import checked_names, nearest, plain_values, refuse, value_problems
from sae_training.config.io import FIELD_NAMES, config_from_dict
from sae_training.config.run import LanguageModelSAERunnerConfig
from sae_training.config.types import Architecture, Dtype, SchedulerName


@checked_names
@dataclass(kw_only=True)
class SAEToyModelRunnerConfig:
    """Everything that one training run on synthetic data needs to know."""

    # The dictionary

    n_features: int = 512
    """True features."""

    n_hidden: int = 128
    """Dimensions that the features share: the width of the rows."""

    max_cosine: float | None = None
    """Spread the directions until no |cosine| is above this; None leaves them random."""

    # When features fire, and how strongly

    feature_probability: float = 0.0125
    """Mean share of rows on which a feature fires: n_features times this fire per row."""

    frequencies: Literal["zipf", "uniform"] = "zipf"
    """zipf: feature i fires in proportion to 1 / (i + 1) ** zipf_exponent; uniform: all alike."""

    zipf_exponent: float = 0.5
    """How unequal the frequencies are; 0 is uniform."""

    magnitudes: Literal["one_plus_normal", "uniform"] = "one_plus_normal"
    """Activation of a firing feature: 1 + |standard normal|, or uniform from 0 to 1 (as in mats)."""

    n_parents: int = 0
    """Features (the first ones) that have children, which fire only where their parent does."""

    children_per_parent: int = 2
    """Children of each parent; they are the features that follow the parents."""

    child_probability: float = 0.3
    """Share of its parent's rows on which a child fires."""

    n_correlated_groups: int = 0
    """Groups of features that tend to fire together; they follow the children."""

    correlated_group_size: int = 2
    """Features in each such group."""

    correlation: float = 0.8
    """Correlation in a group of the normals whose tails decide firing; 1: all or none fire."""

    n_anticorrelated_pairs: int = 0
    """Pairs of features that never fire together; they follow the groups."""

    bias_norm: float = 0.0
    """Norm of a vector in a random direction that is added to every row."""

    noise_std: float = 0.0
    """Standard deviation of the normal noise on every element of a row."""

    # Autoencoder

    architecture: Architecture = "topk"
    """Any architecture of the main config."""

    d_sae: int = 1024
    """Latents; a multiple of n_hidden."""

    k: int = 6
    """Active latents per row (topk, batchtopk, matryoshka)."""

    l1_coefficient: float = 1.5e-3
    """Weight of the sparsity penalty (standard and gated: L1, jumprelu: L0)."""

    l1_warm_up_steps: int = 500
    """Steps over which the L1 weight rises linearly from 0."""

    auxk_coefficient: float | Literal["auto"] = "auto"
    """Weight of the AuxK loss for dead latents; auto is 1/4 with a fixed k, else 0."""

    use_ghost_grads: bool = False
    """Revive dead latents with ghost gradients."""

    feature_sampling_window: int = 1000
    """Steps over which firing frequencies are counted before they start anew."""

    dead_feature_window: int = 100
    """Steps without firing after which a latent counts as dead."""

    b_dec_init_method: Literal["geometric_median", "mean", "zeros"] = "zeros"
    """Starting value of the decoder bias; zeros is right for data without a bias."""

    dtype: Dtype = cast("Dtype", "float32")
    """Precision of the autoencoder's weights: float32, bfloat16, float16 or float64."""

    sae: dict[str, Any] = field(default_factory=dict)
    """Values for other fields of the main config, by name: {"lr_decay_steps": 100}; in flags, lr_decay_steps=100."""

    # Training

    total_training_tokens: int = 768_000
    """Rows to train on; all are drawn afresh."""

    train_batch_size: int = 512
    """Rows per training step."""

    lr: float | Literal["auto"] = 1e-2
    """Learning rate; auto is the rule of the main config, made for language models."""

    lr_scheduler_name: SchedulerName = "linearwarmupdecay"
    """Course of the learning rate."""

    lr_warm_up_steps: int | Literal["auto"] = 50
    """Steps of linear warm-up; auto is a quarter of the run, at most 1000."""

    n_eval_rows: int = 16_384
    """Rows, not trained on, over which the scores that need firings are taken."""

    # Logging, folder and machine

    log_to_wandb: bool = False
    """Mirror the metrics to Weights & Biases; the run folder has them in any case."""

    wandb_project: str = "mats_sae_training_toy_model"
    """Project on Weights & Biases."""

    wandb_entity: str | None = None
    """User or team on Weights & Biases; None is your default."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of Weights & Biases; None is online if a key is there, else offline."""

    wandb_log_frequency: int = 50
    """Steps between logged rows."""

    run_name: str | None = None
    """Name of the run and of its folder; None makes one from the sizes."""

    run_dir: str = "runs"
    """Folder that holds the run folders."""

    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    seed: int = 42
    """Seed of the dictionary, the data and the weights."""

    def __post_init__(self) -> None:
        for name, value in plain_values(self).items():
            setattr(self, name, value)
        refuse(type(self), problems(self))
        self.dtype = autoencoder_config(self).dtype

    @property
    def d_in(self) -> int:
        """n_hidden, under its name in the main config."""
        return self.n_hidden

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


# Fields that the two configs have in common go to the autoencoder as they are.
SHARED = tuple(f.name for f in fields(SAEToyModelRunnerConfig) if f.name in FIELD_NAMES)

# What the main config wants besides, and a toy run has none of. The "buffer" is just large enough to be accepted.
PLACEHOLDERS: dict[str, Any] = {
    "model_name": "toy-model",
    "hook_point": "rows",
    "dataset_path": "toy-model",
    "context_size": 2,
    "n_batches_in_buffer": 1,
}

# Fields of the main config that say nothing to a toy run, or whose work the toy runner does not do.
NOT_FOR_TOYS = (
    *PLACEHOLDERS,
    *("d_in", "expansion_factor", "store_batch_size"),  # they follow from n_hidden, d_sae and train_batch_size
    *("hook_point_layer", "layer_stride", "hook_point_head_index", "lm_dtype", "compile_lm"),
    *("target_hook_point", "d_out", "skip_connection"),
    *(
        "dataset_weights",
        "max_activation_norm_multiple",
        "dataset_split",
        "dataset_text_column",
        "is_dataset_tokenized",
        "streaming",
        "eval_dataset_path",
    ),
    *("prepend_bos", "sequence_separator_token", "exclude_special_tokens", "seqpos_slice"),
    *("use_cached_activations", "cached_activations_path", "tokenizer_processes"),
    *("normalize_activations", "from_pretrained_path", "grad_acc_steps", "parallel", "feature_sampling_method"),
    *("n_eval_batches", "eval_every_steps", "checkpoint_path", "resume"),
    *("checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "n_checkpoints"),
)

RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("n_features", "n_hidden", "d_sae", "children_per_parent", "n_eval_rows"), lambda v: v > 0, "more than 0"),
    (("feature_probability", "child_probability", "max_cosine"), lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    (("correlation",), lambda v: 0 <= v <= 1, "0 to 1"),
    (("correlated_group_size",), lambda v: v >= 2, "at least 2"),
    (("n_parents", "n_correlated_groups", "n_anticorrelated_pairs"), lambda v: v >= 0, "0 or more"),
    (("zipf_exponent", "bias_norm", "noise_std"), lambda v: v >= 0, "0 or more"),
)


def autoencoder_config(cfg: SAEToyModelRunnerConfig) -> LanguageModelSAERunnerConfig:
    """The config of the autoencoder and its training: the shared fields, the sizes, and `cfg.sae`."""
    values = {name: getattr(cfg, name) for name in SHARED}
    values |= {"d_in": cfg.n_hidden, "expansion_factor": cfg.d_sae // cfg.n_hidden}
    values |= {"store_batch_size": cfg.train_batch_size}
    return config_from_dict(PLACEHOLDERS | values | cfg.sae)


def problems(cfg: SAEToyModelRunnerConfig) -> list[str]:
    """One line per problem: `field: what was found, what was expected; what to do`."""
    values = plain_values(cfg)
    found = value_problems(values, type(cfg))
    for names, is_right, expected in RANGES:
        for name in names:
            if name not in found and values[name] is not None and not is_right(values[name]):
                found[name] = f"{name}: found {values[name]}, expected {expected}; change it"
    if "sae" not in found and (lines := option_problems(cfg.sae)):
        found["sae"] = "\n".join(lines)
    for needed, rule in RELATIONS:
        if not found.keys() & set(needed) and (line := rule(cfg)):
            found[needed[0]] = line
    if not found.keys() & {*SHARED, "n_hidden", "d_sae", "sae"}:
        try:
            autoencoder_config(cfg)
        except ValueError as error:
            found["sae"] = "\n".join(str(error).splitlines()[1:])  # without the count at its head
    return "\n".join(found.values()).splitlines()


def option_problems(options: dict[str, Any]) -> list[str]:
    """What is wrong with the names in `sae`, and with the values by themselves."""
    usable = [name for name in FIELD_NAMES if name not in SHARED and name not in NOT_FOR_TOYS]
    lines = []
    for name in options:
        guess = nearest(str(name), usable)
        if name in SHARED:
            lines.append(f"sae: {name} is a field of SAEToyModelRunnerConfig itself; give it there")
        elif name in NOT_FOR_TOYS:
            lines.append(f"sae: {name} has no meaning for a toy run; leave it out")
        elif name not in usable:
            hint = f"did you mean {guess!r}?" if guess else "see sae_training/config.py for the fields"
            lines.append(f"sae: {name} is not a field of LanguageModelSAERunnerConfig; {hint}")
    return lines + [f"sae: {line}" for line in value_problems(options, LanguageModelSAERunnerConfig).values()]


def welch_bound(n: int, d: int) -> float:
    """What the largest |cosine| between n unit vectors in d dimensions is at least: sqrt((n - d) / (d (n - 1)))."""
    return math.sqrt(max(0, n - d) / (d * max(1, n - 1)))


def _width_not_a_multiple(cfg: SAEToyModelRunnerConfig) -> str | None:
    if cfg.d_sae % cfg.n_hidden == 0:
        return None
    above = -(-cfg.d_sae // cfg.n_hidden) * cfg.n_hidden
    return f"d_sae: found {cfg.d_sae}, expected a multiple of n_hidden = {cfg.n_hidden}; {above} is the next"


def _too_few_features(cfg: SAEToyModelRunnerConfig) -> str | None:
    families = cfg.n_parents * (1 + cfg.children_per_parent)
    needed = families + cfg.n_correlated_groups * cfg.correlated_group_size + 2 * cfg.n_anticorrelated_pairs
    if needed <= cfg.n_features:
        return None
    return (
        f"n_features: found {cfg.n_features}, expected at least the {needed} that parents with children, correlated "
        "groups and anticorrelated pairs take; raise it or lower those"
    )


def _closer_than_possible(cfg: SAEToyModelRunnerConfig) -> str | None:
    n, d = cfg.n_features, cfg.n_hidden
    bound = welch_bound(n, d)
    if cfg.max_cosine is None or cfg.max_cosine > bound:
        return None
    return (
        f"max_cosine: found {cfg.max_cosine}, expected more than {bound:.3f}, below which no {n} directions in {d} "
        "dimensions stay; raise it or leave it out"
    )


# The fields that must be sound before the rule can be asked; the problem is filed under the first of them.
RELATIONS: tuple[tuple[tuple[str, ...], Callable[[SAEToyModelRunnerConfig], str | None]], ...] = (
    (("d_sae", "n_hidden"), _width_not_a_multiple),
    (
        (
            "n_features",
            *("n_parents", "children_per_parent", "n_correlated_groups", "correlated_group_size"),
            "n_anticorrelated_pairs",
        ),
        _too_few_features,
    ),
    (("max_cosine", "n_features", "n_hidden"), _closer_than_possible),
)
