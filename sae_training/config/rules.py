"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sae_training.config.checks import plain_values, value_problems
from sae_training.config.sweep import MAX_COMBINATIONS, is_several, listed_fields, n_combinations, variants, with_layers
from sae_training.config.types import FIXED_K, OPTION_OF, WITH_PENALTY

if TYPE_CHECKING:
    from sae_training.config.cache import CacheActivationsRunnerConfig as CacheConfig
    from sae_training.config.run import LanguageModelSAERunnerConfig as Config

# What this version does of each option that has values it does not know how to train yet.
BUILT: dict[str, tuple[object, ...]] = {
    "parallel": ("data",),
}


def problems(cfg: Config) -> list[str]:
    """One line per problem: `field: what was found, what was expected; what to do`."""
    values = plain_values(cfg)
    found = value_problems(values, type(cfg))
    for name, built in BUILT.items():
        if name not in found and not isinstance(values[name], list) and values[name] not in built:
            available = ", ".join(str(option) for option in built)
            advice = "choose one" if len(built) > 1 else "leave the field out"
            found[name] = f"{name}: {values[name]!r} is not trained by this version; available: {available}; {advice}"
    if is_several(cfg):
        return list(found.values()) or problems_of_several(cfg)
    for needed, rule in RELATIONS:
        if not found.keys() & set(needed) and (line := rule(cfg)):
            found[needed[0]] = line
    return list(found.values())


def problems_of_several(cfg: Config) -> list[str]:
    """The problems of the lists together, and of each config that they stand for."""
    hooks = cfg.hook_point if isinstance(cfg.hook_point, list) else [cfg.hook_point]
    has_layers = cfg.hook_point_layer == "all" or isinstance(cfg.hook_point_layer, list)
    if has_layers and not all("{layer}" in hook for hook in hooks):
        asked = "all layers" if cfg.hook_point_layer == "all" else f"layers {cfg.hook_point_layer}"
        return [
            f"hook_point: found {cfg.hook_point!r} with {asked}, expected {{layer}} where the number goes; write for "
            "instance blocks.{layer}.hook_resid_post"
        ]
    n_layers = len(cfg.hook_point_layer) if isinstance(cfg.hook_point_layer, list) else 1 + has_layers
    if cfg.max_activation_norm_multiple is not None and len(hooks) * n_layers > 1:
        return [
            f"max_activation_norm_multiple: found {cfg.max_activation_norm_multiple} with several hooks, expected one: "
            "the rows of all are of the same tokens, and each hook has its own outliers; leave it out "
            "(exclude_special_tokens takes care of BOS)"
        ]
    if cfg.layer_stride != 1 and cfg.hook_point_layer != "all":
        return [
            f"layer_stride: found {cfg.layer_stride} with hook_point_layer {cfg.hook_point_layer}, expected 'all'; "
            "leave one out"
        ]
    for name, users in (("k", FIXED_K), ("l1_coefficient", WITH_PENALTY)):
        asked = getattr(cfg, name)
        architectures = cfg.architecture if isinstance(cfg.architecture, list) else [cfg.architecture]
        if isinstance(asked, list) and not {*architectures} & {*users}:
            return [
                f"{name}: found {asked} with architecture {', '.join(architectures)}, which does not have it, expected "
                f"one value; leave it out, or set architecture to one of {', '.join(users)}"
            ]
    cfg = with_layers(cfg, n_layers=1)  # how many there are, the model says
    if (n := n_combinations(cfg)) > MAX_COMBINATIONS:
        return [f"{listed_fields(cfg)[0]}: the lists stand for {n} autoencoders, expected at most {MAX_COMBINATIONS}"]
    return list(dict.fromkeys(line for single in variants(cfg).values() for line in problems(single)))


def _k_too_large(cfg: Config) -> str | None:
    if cfg.architecture not in FIXED_K or cfg.d_sae is None or cfg.k <= cfg.d_sae:
        return None
    return (
        f"k: found {cfg.k}, expected at most d_sae = {cfg.d_sae} "
        f"(d_in {cfg.d_in} x expansion_factor {cfg.expansion_factor}); "
        "lower k or raise expansion_factor"
    )


def _widths_not_nested(cfg: Config) -> str | None:
    widths = cfg.matryoshka_widths
    if cfg.architecture != "matryoshka":
        return None
    ascending = all(a < b for a, b in zip(widths, widths[1:], strict=False))
    if not widths or ascending and (cfg.d_sae is None or widths[-1] <= cfg.d_sae):
        return None
    return (
        f"matryoshka_widths: found {list(widths)}, expected sizes of nested dictionaries, ascending and at most d_sae"
        f"{'' if cfg.d_sae is None else f' = {cfg.d_sae}'}; for instance d_sae / 8, d_sae / 4 and d_sae / 2"
    )


def _option_of_another(cfg: Config) -> str | None:
    """An option that the architecture would silently ignore."""
    for name, architectures in OPTION_OF.items():
        value = getattr(cfg, name)
        if value != getattr(type(cfg), name) and cfg.architecture not in architectures:
            expected = " or ".join(architectures)
            return f"{name}: found {value} with architecture {cfg.architecture}, expected {expected}; set one of them"
    step = cfg.architecture == "jumprelu" and cfg.jumprelu_sparsity_loss_mode == "step"
    if cfg.target_l0 is not None and (cfg.micro_batch_size is not None or cfg.grad_acc_steps > 1):
        return (
            f"target_l0: found {cfg.target_l0} with micro_batch_size {cfg.micro_batch_size}, grad_acc_steps "
            f"{cfg.grad_acc_steps}, expected whole batches, of whose L0 the penalty is no sum; leave one out"
        )
    if cfg.target_l0 is not None and not step:
        return f"target_l0: found {cfg.target_l0} with jumprelu_sparsity_loss_mode tanh, expected step; set one of them"
    if cfg.scale_sparsity_penalty_by_decoder_norm and step:
        return (
            "scale_sparsity_penalty_by_decoder_norm: found True with jumprelu_sparsity_loss_mode step, which counts "
            "latents and not their sizes; set it to tanh"
        )
    return None


def _transcoder_option_without_target(cfg: Config) -> str | None:
    """What only a transcoder has, or cannot have."""
    if cfg.target_hook_point is None:
        for name, allowed in (("d_out", (None, cfg.d_in)), ("skip_connection", (False,))):
            if (value := getattr(cfg, name)) not in allowed:
                return (
                    f"{name}: found {value} without target_hook_point, expected a hook whose activations to predict; "
                    f"name one, or leave {name} out"
                )
    elif cfg.hook_point_head_index is not None:
        return (
            f"hook_point_head_index: found {cfg.hook_point_head_index} with target_hook_point "
            f"{cfg.target_hook_point!r}, expected None, which takes all heads; leave it out"
        )
    return None


def _normalised_target(cfg: Config) -> str | None:
    if cfg.target_hook_point is None or cfg.normalize_activations in ("none", "expected_average_only_in"):
        return None
    return (
        f"normalize_activations: found {cfg.normalize_activations} with target_hook_point {cfg.target_hook_point!r}, "
        "expected expected_average_only_in or none: the size of a target is not known where it is predicted"
    )


def _not_in_8_bits(cfg: Config) -> str | None:
    if cfg.optimizer != "adam8bit":
        return None
    if cfg.feature_sampling_method is not None:
        return (
            f"optimizer: found adam8bit with feature_sampling_method {cfg.feature_sampling_method}, expected adam or "
            "signum, whose moments can be reset latent by latent; change one of them"
        )
    if str(cfg.dtype).removeprefix("torch.") == "float64":
        return "optimizer: found adam8bit with dtype float64, expected adam or signum; change one of them"
    return None


def _batch_too_large(cfg: Config) -> str | None:
    half = cfg.buffer_rows // 2
    if cfg.tokens_per_step <= half or cfg.use_cached_activations:  # of a cache, its form decides
        return None
    per_batch = cfg.store_batch_size * cfg.context_size
    needed = -(-2 * cfg.tokens_per_step // per_batch)
    several = f" x grad_acc_steps {cfg.grad_acc_steps}" if cfg.grad_acc_steps > 1 else ""
    return (
        f"train_batch_size: found {cfg.train_batch_size}{several}, expected at most {half}, half of the "
        f"buffer of {cfg.buffer_rows} rows (n_batches_in_buffer {cfg.n_batches_in_buffer} x "
        f"store_batch_size {cfg.store_batch_size} x context_size {cfg.context_size}); "
        f"raise n_batches_in_buffer to {needed} or lower train_batch_size"
    )


def _no_positions(cfg: Config) -> str | None:
    bounds = cfg.seqpos_slice
    if not bounds:
        return None
    right = len(bounds) in (2, 3) and 0 not in bounds[2:]
    if right and len(range(cfg.context_size)[slice(*bounds)]) > 0:
        return None
    return (
        f"seqpos_slice: found {list(bounds)} with context_size {cfg.context_size}, expected start and stop, perhaps "
        f"a step, that take some positions; 1,{cfg.context_size} for instance takes all but the first"
    )


def weights_without_datasets(cfg: Config | CacheConfig) -> str | None:
    """Weights of another number than there are data sets."""
    paths, weights = cfg.dataset_path, cfg.dataset_weights
    if not weights or isinstance(paths, list) and len(paths) == len(weights):
        return None
    found = f"{len(weights)} weight{'s' if len(weights) > 1 else ''}"
    given = f"a list of {len(paths)} paths" if isinstance(paths, list) else f"the single path {paths!r}"
    expected = "one for each path" if isinstance(paths, list) else "none, or a list of paths"
    return f"dataset_weights: found {found} with {given} in dataset_path, expected {expected}; change one of them"


def _too_few_tokens(cfg: Config) -> str | None:
    if cfg.total_training_tokens >= cfg.tokens_per_step:
        return None
    several = f" x grad_acc_steps = {cfg.tokens_per_step}" if cfg.grad_acc_steps > 1 else ""
    return (
        f"total_training_tokens: found {cfg.total_training_tokens}, expected at least one batch of "
        f"train_batch_size = {cfg.train_batch_size}{several}; raise it or lower train_batch_size"
    )


def _decay_too_long(cfg: Config) -> str | None:
    if cfg.lr_decay_steps <= cfg.total_training_steps:
        return None
    return (
        f"lr_decay_steps: found {cfg.lr_decay_steps}, expected at most the run's "
        f"{cfg.total_training_steps} steps; lower it"
    )


def _two_remedies(cfg: Config) -> str | None:
    if not cfg.use_ghost_grads or cfg.resolved_auxk_coefficient == 0:
        return None
    return (
        f"use_ghost_grads: found True with auxk_coefficient {cfg.auxk_coefficient}, expected one "
        "remedy for dead latents; set use_ghost_grads to False or auxk_coefficient to 0"
    )


def _cache_without_path(cfg: Config) -> str | None:
    if cfg.use_cached_activations is False or cfg.cached_activations_path is not None:
        return None
    return (
        f"cached_activations_path: found None with use_cached_activations {cfg.use_cached_activations}, expected the "
        "folder that `sae-training cache` wrote; give it"
    )


def _two_run_folders(cfg: Config) -> str | None:
    if cfg.checkpoint_path is None or cfg.run_dir in ("runs", cfg.checkpoint_path):
        return None
    return (
        f"checkpoint_path: found {cfg.checkpoint_path!r} with run_dir {cfg.run_dir!r}, expected "
        "one of them (checkpoint_path is the old name of run_dir); leave checkpoint_path out"
    )


# The fields that must be sound before the rule can be asked; the problem is filed under the first
# of them.
RELATIONS: tuple[tuple[tuple[str, ...], Callable[[Config], str | None]], ...] = (
    (("k", "d_in", "expansion_factor", "architecture"), _k_too_large),
    (("matryoshka_widths", "architecture", "d_in", "expansion_factor"), _widths_not_nested),
    (("architecture", *OPTION_OF, "micro_batch_size", "grad_acc_steps"), _option_of_another),
    (("normalize_activations", "target_hook_point"), _normalised_target),
    (("optimizer", "feature_sampling_method", "dtype"), _not_in_8_bits),
    (("skip_connection", "target_hook_point", "d_out", "hook_point_head_index"), _transcoder_option_without_target),
    (
        ("train_batch_size", "grad_acc_steps", "n_batches_in_buffer", "store_batch_size", "context_size"),
        _batch_too_large,
    ),
    (("seqpos_slice", "context_size"), _no_positions),
    (("dataset_weights", "dataset_path"), weights_without_datasets),
    (("total_training_tokens", "train_batch_size", "grad_acc_steps"), _too_few_tokens),
    (("lr_decay_steps", "total_training_tokens", "train_batch_size", "grad_acc_steps"), _decay_too_long),
    (("use_ghost_grads", "auxk_coefficient", "architecture"), _two_remedies),
    (("cached_activations_path", "use_cached_activations"), _cache_without_path),
    (("checkpoint_path", "run_dir"), _two_run_folders),
)
