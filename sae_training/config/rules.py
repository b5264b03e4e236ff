"""Which fields of a config fit together.

A rule is a function of the fields that it names as parameters; it returns None, or the problem as a line of the form
`field: what was found, what was expected; what to do`. A rule is asked of every config that has its fields (parameters
with a default may be absent), so that runs, toy runs and caches share rules without sharing a class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sae_training.config import jumprelu, placement, training
from sae_training.config.auto import auto_auxk_coefficient
from sae_training.config.checks import plain_values, value_problems
from sae_training.config.fields import OPTION_OF
from sae_training.config.sweep import MAX_COMBINATIONS, is_several, listed_fields, n_combinations, variants, with_layers
from sae_training.config.types import FIXED_K, WITH_K, WITH_PENALTY

Rule = Callable[..., str | None]


def check(cfg: Any, own_rules: Iterable[Rule] = ()) -> None:
    """Store the fields of a new config in plain types; ValueError with all problems at once.

    `own_rules` are the rules of the config's class alone.
    """
    for name, value in plain_values(cfg).items():
        setattr(cfg, name, value)
    if found := problems(cfg, own_rules):
        noun = "problem" if len(found) == 1 else "problems"
        raise ValueError("\n".join([f"{type(cfg).__name__}: {len(found)} {noun}", *found]))


def problems(cfg: Any, own_rules: Iterable[Rule] = ()) -> list[str]:
    """Return one line per problem."""
    values = plain_values(cfg)
    found = value_problems(values, type(cfg))
    if is_several(cfg):
        return list(found.values()) or problems_of_several(cfg, values)
    return list(broken_together(cfg, values, found, own_rules).values())


def broken_together(
    cfg: Any, values: dict[str, Any], found: dict[str, str], own_rules: Iterable[Rule] = ()
) -> dict[str, str]:
    """Return `found`, the problems of values by themselves, with those of the values of a single config together."""
    if "d_sae" not in values and not {"d_in", "expansion_factor"} & found.keys():
        values["d_sae"] = getattr(cfg, "d_sae", None)
    of_training = () if values.get("file_format") else training.RULES
    found = broken((*OF_SINGLE, *of_training, *own_rules), values, found)
    for name in OPTION_OF:
        if name in values and not {name, "architecture"} & found.keys():
            found |= option_of_another(name, values, type(cfg))
    return found


def check_for_training(cfg: Any) -> None:
    """Raise ValueError, with all problems at once, for a config of what is read from files and not trained."""
    lines = [line for single in variants(cfg).values() for line in not_trained(plain_values(single))]
    if lines:
        raise ValueError("\n".join(dict.fromkeys(lines)))


def not_trained(values: Mapping[str, Any]) -> list[str]:
    return list(broken(training.RULES, values, {}).values())


def problems_of_several(cfg: Any, values: Mapping[str, Any]) -> list[str]:
    """Return the problems of the lists together, or else of each config that they stand for."""
    if found := broken(OF_LISTS, values, {}):
        return list(found.values())
    cfg = with_layers(cfg, n_layers=1)  # how many there are, the model says
    if (n := n_combinations(cfg)) > MAX_COMBINATIONS:
        return [f"{listed_fields(cfg)[0]}: the lists stand for {n} autoencoders, expected at most {MAX_COMBINATIONS}"]
    singles = variants(cfg).values()  # whose values have been checked one by one, as elements of the lists
    return list(dict.fromkeys(line for s in singles for line in broken_together(s, plain_values(s), {}).values()))


def broken(rules: Iterable[Rule], values: Mapping[str, Any], found: dict[str, str]) -> dict[str, str]:
    """Return `found` with the line of each broken rule, under its first field; fields that are `found` ask no rule."""
    for rule in rules:
        fields = parameters(rule)
        needed = [name for name, parameter in fields.items() if parameter.default is parameter.empty]
        if found.keys() & fields.keys() or not values.keys() >= {*needed}:
            continue
        if line := rule(**{name: values[name] for name in fields if name in values}):
            found[needed[0]] = line
    return found


@functools.cache
def parameters(rule: Rule) -> Mapping[str, inspect.Parameter]:
    """Return the fields that a rule asks for."""
    return inspect.signature(rule).parameters


def option_of_another(name: str, values: Mapping[str, Any], cls: type[Any]) -> dict[str, str]:
    """Refuse an option that the architecture would silently ignore: its line, under "architecture"."""
    architecture, owners, value = values["architecture"], OPTION_OF[name], values[name]
    if architecture in owners or value == getattr(cls, name):
        return {}
    expected = " or ".join(owners)
    return {
        "architecture": f"{name}: found {value} with architecture {architecture}, expected {expected}; set one of them"
    }


# ------------------------------------------------------------------------------------------------------ lists together


def layers_without_a_place(hook_point: Any, hook_point_layer: Any) -> str | None:
    """Refuse several layers if the hook's name has no place for the number."""
    hooks = hook_point if isinstance(hook_point, list) else [hook_point]
    if isinstance(hook_point_layer, int) or all("{layer}" in hook for hook in hooks):
        return None
    asked = "all layers" if hook_point_layer == "all" else f"layers {hook_point_layer}"
    return (
        f"hook_point: found {hook_point!r} with {asked}, expected {{layer}} where the number goes; write for "
        "instance blocks.{layer}.hook_resid_post"
    )


def one_norm_for_several_hooks(
    max_activation_norm_multiple: float | None, hook_point: Any, hook_point_layer: Any
) -> str | None:
    """Refuse to leave out rows by their norm at several hooks."""
    n_hooks = len(hook_point) if isinstance(hook_point, list) else 1
    n_layers = len(hook_point_layer) if isinstance(hook_point_layer, list) else 1 + (hook_point_layer == "all")
    if max_activation_norm_multiple is None or n_hooks * n_layers <= 1:
        return None
    return (
        f"max_activation_norm_multiple: found {max_activation_norm_multiple} with several hooks, expected one: "
        "the rows of all are of the same tokens, and each hook has its own outliers; leave it out "
        "(exclude_special_tokens takes care of BOS)"
    )


def stride_without_all(layer_stride: int, hook_point_layer: Any) -> str | None:
    """Refuse a stride through layers that are listed one by one."""
    if layer_stride == 1 or hook_point_layer == "all":
        return None
    return f"layer_stride: found {layer_stride} with hook_point_layer {hook_point_layer}, expected 'all'; leave one out"


def lists_that_nothing_uses(k: Any, l1_coefficient: Any, architecture: Any) -> str | None:
    """Refuse several values of what no architecture of the config has."""
    architectures = architecture if isinstance(architecture, list) else [architecture]
    for name, asked, users in (("k", k, FIXED_K), ("l1_coefficient", l1_coefficient, WITH_PENALTY)):
        if isinstance(asked, list) and not {*architectures} & {*users}:
            return (
                f"{name}: found {asked} with architecture {', '.join(architectures)}, which does not have it, expected "
                f"one value; leave it out, or set architecture to one of {', '.join(users)}"
            )
    return None


def two_widths(n_latents: int | None, expansion_factor: Any) -> str | None:
    """Refuse several widths together with one that takes their place."""
    if n_latents is None or not isinstance(expansion_factor, list):
        return None
    return f"n_latents: found {n_latents} with expansion_factor {expansion_factor}, expected one of them; leave one out"


OF_LISTS: tuple[Rule, ...] = (
    two_widths,
    layers_without_a_place,
    one_norm_for_several_hooks,
    stride_without_all,
    lists_that_nothing_uses,
)

# -------------------------------------------------------------------------------------------------- one configuration


def k_too_large(
    k: int, architecture: str, d_sae: int | None, d_in: int | None = None, expansion_factor: int | None = None
) -> str | None:
    """Refuse more active latents than there are."""
    if architecture not in WITH_K or d_sae is None or k <= d_sae:
        return None
    if expansion_factor is None or d_in is None or d_sae != d_in * expansion_factor:
        return f"k: found {k}, expected at most d_sae = {d_sae}; lower k or raise d_sae"
    return (
        f"k: found {k}, expected at most d_sae = {d_sae} (d_in {d_in} x expansion_factor {expansion_factor}); "
        "lower k or raise expansion_factor"
    )


def widths_not_nested(matryoshka_widths: tuple[int, ...], architecture: str, d_sae: int | None) -> str | None:
    """Refuse sizes of nested dictionaries that do not grow, or exceed d_sae."""
    widths = matryoshka_widths
    ascending = all(a < b for a, b in zip(widths, widths[1:], strict=False))
    if architecture != "matryoshka" or not widths or ascending and (d_sae is None or widths[-1] <= d_sae):
        return None
    return (
        f"matryoshka_widths: found {list(widths)}, expected sizes of nested dictionaries, ascending and at most d_sae"
        f"{'' if d_sae is None else f' = {d_sae}'}; for instance d_sae / 8, d_sae / 4 and d_sae / 2"
    )


def option_without_target(
    d_out: int | None, skip_connection: bool, target_hook_point: str | None, d_in: int | None
) -> str | None:
    """Refuse what only transcoders have: an output of another width, a skip connection."""
    for name, value, allowed in (("d_out", d_out, (None, d_in)), ("skip_connection", skip_connection, (False,))):
        if target_hook_point is None and value not in allowed:
            return (
                f"{name}: found {value} without target_hook_point, expected a hook whose activations to predict; "
                f"name one, or leave {name} out"
            )
    return None


def head_of_a_transcoder(hook_point_head_index: int | None, target_hook_point: str | None) -> str | None:
    """Refuse a transcoder that reads one head."""
    if hook_point_head_index is None or target_hook_point is None:
        return None
    return (
        f"hook_point_head_index: found {hook_point_head_index} with target_hook_point {target_hook_point!r}, "
        "expected None, which takes all heads; leave it out"
    )


def not_in_8_bits(optimizer: str, dtype: str, feature_sampling_method: str | None = None) -> str | None:
    """Refuse moments in 8 bits where they would have to be reset, or be wider."""
    if optimizer != "adam8bit":
        return None
    if feature_sampling_method is not None:
        return (
            f"optimizer: found adam8bit with feature_sampling_method {feature_sampling_method}, expected adam or "
            "signum, whose moments can be reset latent by latent; change one of them"
        )
    if dtype == "float64":
        return "optimizer: found adam8bit with dtype float64, expected adam or signum; change one of them"
    return None


def no_float64_there(device: str, dtype: str) -> str | None:
    """Refuse float64 on a device that has none."""
    if dtype != "float64" or device.partition(":")[0] != "mps":
        return None
    return f"dtype: found float64 with device {device}, which has none, expected float32; or set device to cpu"


def batch_too_large(
    train_batch_size: int,
    n_batches_in_buffer: int,
    store_batch_size: int,
    context_size: int,
    use_cached_activations: bool | str,
    grad_acc_steps: int,
) -> str | None:
    """Refuse a step that takes more than half of the buffer; with a cache, its form decides."""
    rows, per_step = n_batches_in_buffer * store_batch_size * context_size, train_batch_size * grad_acc_steps
    if per_step <= rows // 2 or use_cached_activations:
        return None
    several = f" x grad_acc_steps {grad_acc_steps}" if grad_acc_steps > 1 else ""
    return (
        f"train_batch_size: found {train_batch_size}{several}, expected at most {rows // 2}, half of the "
        f"buffer of {rows} rows (n_batches_in_buffer {n_batches_in_buffer} x "
        f"store_batch_size {store_batch_size} x context_size {context_size}); "
        f"raise n_batches_in_buffer to {-(-2 * per_step // (store_batch_size * context_size))} or lower "
        "train_batch_size"
    )


def no_positions(seqpos_slice: tuple[int | None, ...], context_size: int) -> str | None:
    """Refuse a slice of positions that is none, or takes none."""
    right = seqpos_slice == (None,) or len(seqpos_slice) in (2, 3) and 0 not in seqpos_slice[2:]
    if not seqpos_slice or right and len(range(context_size)[slice(*seqpos_slice)]) > 0:
        return None
    return (
        f"seqpos_slice: found {list(seqpos_slice)} with context_size {context_size}, expected start and stop, perhaps "
        "a step, that take some positions; 1,None for instance takes all but the first, -1,None the last"
    )


def separator_between_nothing(pack_sequences: bool, sequence_separator_token: str | int) -> str | None:
    """Refuse a separator where no documents are joined."""
    if pack_sequences or sequence_separator_token in ("auto", "none"):
        return None
    return (
        f"sequence_separator_token: found {sequence_separator_token!r} with pack_sequences False, expected auto or "
        "none: no document comes after another in a context; leave one out"
    )


def weights_without_datasets(dataset_weights: tuple[float, ...], dataset_path: str | list[str]) -> str | None:
    """Refuse weights of another number than there are data sets."""
    paths, weights = dataset_path, dataset_weights
    if not weights or isinstance(paths, list) and len(paths) == len(weights):
        return None
    found = f"{len(weights)} weight{'s' if len(weights) > 1 else ''}"
    given = f"a list of {len(paths)} paths" if isinstance(paths, list) else f"the single path {paths!r}"
    expected = "one for each path" if isinstance(paths, list) else "none, or a list of paths"
    return f"dataset_weights: found {found} with {given} in dataset_path, expected {expected}; change one of them"


def too_few_tokens(total_training_tokens: int, train_batch_size: int, grad_acc_steps: int = 1) -> str | None:
    """Refuse a run of no step."""
    if total_training_tokens >= train_batch_size * grad_acc_steps:
        return None
    several = f" x grad_acc_steps = {train_batch_size * grad_acc_steps}" if grad_acc_steps > 1 else ""
    return (
        f"total_training_tokens: found {total_training_tokens}, expected at least one batch of "
        f"train_batch_size = {train_batch_size}{several}; raise it or lower train_batch_size"
    )


def decay_too_long(
    lr_decay_steps: int, total_training_tokens: int, train_batch_size: int, grad_acc_steps: int = 1
) -> str | None:
    """Refuse a decay that is longer than the run."""
    steps = total_training_tokens // (train_batch_size * grad_acc_steps)
    if lr_decay_steps <= steps:
        return None
    return f"lr_decay_steps: found {lr_decay_steps}, expected at most the run's {steps} steps; lower it"


def two_remedies(use_ghost_grads: bool, auxk_coefficient: float | str, architecture: str) -> str | None:
    """Refuse two remedies for dead latents at once."""
    has_auxk = auto_auxk_coefficient(architecture) if auxk_coefficient == "auto" else auxk_coefficient
    if not use_ghost_grads or not has_auxk:
        return None
    return (
        f"use_ghost_grads: found True with auxk_coefficient {auxk_coefficient}, expected one "
        "remedy for dead latents; set use_ghost_grads to False or auxk_coefficient to 0"
    )


def cache_without_path(cached_activations_path: str | None, use_cached_activations: bool | str) -> str | None:
    """Refuse to read a cache that is not named."""
    if use_cached_activations is False or cached_activations_path is not None:
        return None
    return (
        f"cached_activations_path: found None with use_cached_activations {use_cached_activations}, expected the "
        "folder that `sae-training cache` wrote; give it"
    )


def two_run_folders(checkpoint_path: str | None, run_dir: str) -> str | None:
    """Refuse run_dir together with another folder under its old name."""
    if checkpoint_path is None or run_dir in ("runs", checkpoint_path):
        return None
    return (
        f"checkpoint_path: found {checkpoint_path!r} with run_dir {run_dir!r}, expected "
        "one of them (checkpoint_path is the old name of run_dir); leave checkpoint_path out"
    )


def no_mesh_of_groups(mesh: tuple[int, ...], parallel: str) -> str | None:
    """Refuse data,latents without the two numbers of a mesh, and a mesh without data,latents."""
    if len(mesh) == (2 if parallel == "data,latents" else 0):
        return None
    if parallel != "data,latents":
        return f"mesh: found {list(mesh)} with parallel {parallel}, expected none; leave it out, or set data,latents"
    return (
        f"mesh: found {list(mesh)} with parallel data,latents, expected two numbers: groups of processes, which share "
        "the rows, and processes of a group, which share the latents; give for instance 2,4 for 2 groups of 4"
    )


OF_SINGLE: tuple[Rule, ...] = (
    k_too_large,
    widths_not_nested,
    *jumprelu.RULES,
    *placement.RULES,
    not_in_8_bits,
    no_float64_there,
    option_without_target,
    head_of_a_transcoder,
    batch_too_large,
    no_positions,
    separator_between_nothing,
    weights_without_datasets,
    too_few_tokens,
    decay_too_long,
    two_remedies,
    cache_without_path,
    two_run_folders,
    no_mesh_of_groups,
)
