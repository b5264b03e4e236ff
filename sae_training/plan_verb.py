"""The verb `plan`: what a run or a cache would take on many GPUs, from a config and a few rates, without a model.

`PlanFlags` is what it asks beside the flags of `train`; `planned` makes the text or JSON that it prints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.checks import field_types, value_problems
from sae_training.config.fields import Origin, Source
from sae_training.config.io import FIELD_NAMES, config_from_dict
from sae_training.config.sweep import variants, with_layers
from sae_training.config.types import Positive, UpToOne
from sae_training.flags import Common, ConfigFile, ModelAndText, hiding, with_words


@dataclass(kw_only=True)
class PlanFlags:
    """What a plan asks of machines and of the language model."""

    gpus: Positive[int] = 1
    """GPUs of a node; on --device cpu, processes."""

    nodes: Positive[int] = 1
    """Nodes."""

    gpu_memory: Positive[float] = 80
    """Memory of a GPU, GiB."""

    gpu_tflops: Positive[float] = 989
    """Products of a GPU in 16 bits, TFLOP/s (989: H100 SXM, by its data sheet)."""

    gpu_tflops_32: Positive[float] = 67
    """Products in float32, TFLOP/s (67: H100 without TF32)."""

    memory_bandwidth: Positive[float] = 3350
    """Memory of a GPU, GB/s (H100 SXM)."""

    interconnect: Positive[float] = 450
    """What a GPU receives from others of its node, GB/s (NVLink 4)."""

    network: Positive[float] = 50
    """What a GPU receives from other nodes, GB/s (a card of 400 Gb/s each)."""

    disk: Positive[float] = 2
    """What a node's disk reads or writes, GB/s; its GPUs read each byte of a cache once together."""

    efficiency: UpToOne[float] = 0.5
    """Share of these rates that is reached."""

    lm_rate: Positive[float] | None = None
    """Tokens/s of the language model's passes on one GPU, if measured; in place of the rates above."""

    step_rate: Positive[float] | None = None
    """Rows/s of a step of all autoencoders on one GPU, if measured; in place of the rates above."""

    triton: bool = False
    """Count on the Triton kernels (SAE_TRAINING_TRITON=1), without which a GPU computes steps the dense way."""

    lm_gpus: Positive[int] = 1
    """GPUs that hold a copy of the language model, one working at a time; more: --device_map auto."""

    n_params: Positive[int] | None = None
    """Weights of a language model of which no config is known; its sizes:"""

    d_model: Positive[int] | None = None
    """Width of the residual stream."""

    n_layers: Positive[int] | None = None
    """Blocks."""

    d_mlp: Positive[int] | None = None
    """Width of an MLP."""

    d_vocab: Positive[int] | None = None
    """Size of the vocabulary."""

    cache: bool = False
    """Plan `cache` in place of `train`."""

    form: Literal["rows", "contexts", "both"] = "rows"
    """With --cache: its form."""

    stored_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """With --cache: its dtype, the precision on disk."""

    json: bool = False
    """Print one JSON object."""


@hiding(Origin)
@dataclass(kw_only=True)
class Plan(LanguageModelSAERunnerConfig, PlanFlags, ModelAndText, Common, ConfigFile):
    """Say what a run, or a cache, would take on many GPUs, and how best to share it: `plan CONFIG --gpus 8`.

    CONFIG is a config file (.yaml or .json) of `train`; or give what `train` takes: MODEL DATASET and flags. For each
    way to share the run: memory of a GPU in parts, tokens/s, bytes between GPUs, whether it fits. No model is loaded;
    its sizes come from its config, or from flags.
    """

    config: Annotated[str | None, arg(metavar="FILE")] = None
    """File of config fields; the same as CONFIG."""

    def __post_init__(self) -> None:
        """Check nothing, as in Train."""


def config_first(words: Sequence[str]) -> list[str]:
    """Return the words with a first word that names a config file as the value of --config."""
    alone = [word for word in words if not word.startswith("-")]
    if not alone or not alone[0].endswith((".yaml", ".yml", ".json")):
        return list(words)
    at = list(words).index(alone[0])
    return [*words[:at], f"--config={alone[0]}", *words[at + 1 :]]


NO_STEPS: dict[str, Any] = {"train_batch_size": 1, "grad_acc_steps": 1, "lr_decay_steps": 0}
"""What a cache has in place of the steps of a run, so that no rule about these refuses it."""


def planned(verb: Plan) -> str:
    """Return the plan that the flags ask for, as text or JSON. ValueError and FileNotFoundError name the wrong flag."""
    names = field_types(PlanFlags)
    if found := value_problems({name: getattr(verb, name) for name in names}, PlanFlags):
        raise ValueError("\n".join(found.values()))
    if verb.lm_gpus > verb.gpus or verb.gpus % verb.lm_gpus:
        raise ValueError(
            f"lm_gpus: found {verb.lm_gpus} with {verb.gpus} GPUs a node, expected a divisor of their number; change it"
        )
    values = with_words({name: getattr(verb, name) for name in FIELD_NAMES}, verb, device="cuda")
    if verb.cache:
        values |= NO_STEPS
    if verb.lm_gpus > 1 and values["device_map"] is None:
        values |= {"device_map": "auto", "model_processing": "none"}  # by which alone a run spreads it
    cfg = config_from_dict(values)
    lm = language_model_of(verb, cfg)
    cfg = with_layers(cfg, lm.n_layers)
    singles = {name: with_widths(single, lm) for name, single in variants(cfg).items()}
    return of_cache(verb, cfg, singles, lm) if verb.cache else of_run(verb, cfg, singles, lm)


def of_run(verb: Plan, cfg: LanguageModelSAERunnerConfig, singles: dict[str, Any], lm: Any) -> str:
    from sae_training.run.job_plan import Job
    from sae_training.run.plan_in_words import in_json, in_words

    rates = {"triton": verb.triton, "lm_gpus": verb.lm_gpus, "lm_rate": verb.lm_rate, "step_rate": verb.step_rate}
    job = Job(cfg, singles, lm, machines_of(verb), **rates)
    return json.dumps(in_json(job), indent=1) + "\n" if verb.json else in_words(job)


def of_cache(verb: Plan, cfg: LanguageModelSAERunnerConfig, singles: dict[str, Any], lm: Any) -> str:
    from sae_training.run.cache_plan import plan_cache
    from sae_training.run.job_plan import hooks_of
    from sae_training.run.plan_in_words import cache_in_json, cache_in_words

    shared = {name: getattr(cfg, name) for name in (*field_types(Source), "total_training_tokens", "device")}
    cache = CacheActivationsRunnerConfig(**shared, form=verb.form, dtype=verb.stored_dtype)
    machines, hooks = machines_of(verb), hooks_of(singles)
    plan = plan_cache(cache, hooks, lm, machines, verb.lm_gpus, verb.lm_rate)
    return json.dumps(cache_in_json(plan, machines)) + "\n" if verb.json else cache_in_words(plan, machines, hooks)


def machines_of(verb: Plan) -> Any:
    from sae_training.parallel.plan import GIGA, Machines

    return Machines(
        gpus=verb.gpus,
        nodes=verb.nodes,
        memory=verb.gpu_memory * 2**30,
        flops_16=verb.gpu_tflops * 1e12,
        flops_32=verb.gpu_tflops_32 * 1e12,
        bandwidth=verb.memory_bandwidth * GIGA,
        interconnect=verb.interconnect * GIGA,
        network=verb.network * GIGA,
        disk=verb.disk * GIGA,
        efficiency=verb.efficiency,
    )


def language_model_of(verb: Plan, cfg: LanguageModelSAERunnerConfig) -> Any:
    """Return the sizes of the language model, in the precision that it will run in."""
    import torch

    from sae_training.language_model.load import language_model_dtype
    from sae_training.language_model.sizes import sizes_of

    on_gpu = cfg.device.partition(":")[0] == "cuda"  # which this machine need not have
    is_auto = cfg.lm_dtype == "auto" and on_gpu
    dtype = torch.bfloat16 if is_auto else language_model_dtype(cfg.lm_dtype, cfg.device)
    given = {name: getattr(verb, name) for name in ("n_params", "d_model", "n_layers", "d_mlp", "d_vocab")}
    sizes = sizes_of(cfg.model_name, given, dtype, processed=cfg.model_processing == "default")
    return dataclasses.replace(sizes, in_8_bits=cfg.load_in_8bit)


def with_widths(single: LanguageModelSAERunnerConfig, lm: Any) -> LanguageModelSAERunnerConfig:
    """Return the config of an autoencoder with the widths of its hooks, as far as their names tell them."""
    from sae_training.language_model.sizes import check_layer, width_of

    places = [("hook_point", "d_in", single.resolved_hook_point, single.hook_point_head_index)]
    if single.resolved_target_hook_point is not None:
        places.append(("target_hook_point", "d_out", single.resolved_target_hook_point, None))
    widths: dict[str, Any] = {}
    for field, name, hook, head in places:
        check_layer(hook, lm)
        width, asked = width_of(hook, lm, head), getattr(single, name)
        if width is None and asked is None:
            raise ValueError(f"{field}: found {hook}, whose width is not known without the model, give {name}")
        if width is not None and asked not in (None, width):
            raise ValueError(f"{name}: found {asked}, but {hook} of this model is {width} wide; leave {name} out")
        widths[name] = asked or width
    return dataclasses.replace(single, **widths)
