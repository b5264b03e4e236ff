"""Flags that several verbs of the command line share, and the values that they stand for.

Torch is not imported here, nor in the verbs' own files: `--help` should answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import Positional, Suppress, arg

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.checks import field_types, plain_value, value_problems
from sae_training.config.files import read_config_values
from sae_training.config.types import OneOrMany
from sae_training.jobs.found import RUN_DIR

# What `train` starts from without a config file; the class itself keeps the defaults of the mats era.
RECIPE: dict[str, Any] = {
    "architecture": "topk",
    "d_in": None,
    "lr": "auto",
    "lr_warm_up_steps": "auto",
    "lr_scheduler_name": "linearwarmupdecay",
    "auxk_coefficient": "auto",
    "exclude_special_tokens": True,
    "is_dataset_tokenized": None,
    "log_to_wandb": False,
    "device": "auto",
}

# A transcoder's input and target have sizes of their own. Demo model, MLP of layer 2, 300k tokens: explained variance
# 0.65 with scaled batches, 0.56 without. Autoencoders of SmolLM2: 0.923 both, but 176 dead latents in place of 30.
TRANSCODER_RECIPE = RECIPE | {"normalize_activations": "expected_average_only_in"}

T = TypeVar("T")


@dataclass(kw_only=True)
class Common:
    """The flags of every verb."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(kw_only=True)
class InRunDir(Common):
    """The flag of verbs that take a run by its name."""

    run_dir: Path = Path(RUN_DIR)
    """Folder that holds the runs."""


@dataclass(kw_only=True)
class Detach:
    """The flag of verbs that may run without a terminal."""

    detach: bool = False
    """Go on without this terminal, in tmux if it is there; `sae-training runs` lists it."""


@dataclass(kw_only=True)
class ModelAndText:
    """A language model, a text and layers, as words of their own."""

    model: Annotated[str | None, Positional, arg(metavar="MODEL")] = None
    """Language model; the same as --model-name, over which it wins."""

    dataset: Annotated[str | None, Positional, arg(metavar="DATASET")] = None
    """Text; the same as --dataset-path with one path, over which it wins."""

    layers: OneOrMany[int | Literal["all"]] | None = None
    """Layers for `{layer}` in --hook-point, each its own: 4 8 12, or all."""


@dataclass(kw_only=True)
class ConfigFile:
    """The flag for other defaults of `train`."""

    config: Annotated[str | None, arg(metavar="FILE")] = None
    """File of config fields (.yaml or .json). Its values are the defaults; flags win over them."""


def hiding(group: type[Any]) -> Callable[[type[T]], type[T]]:
    """Make a dataclass of flags whose help leaves out the fields of a group; config files may still hold them."""

    def hide(cls: type[T]) -> type[T]:
        cls.__annotations__ |= {name: Annotated[hint, Suppress] for name, hint in field_types(group).items()}
        return dataclass(kw_only=True)(cls)

    return hide


def train_defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """Return what the flags of `train` default to: the values of the config file, or else the recipe."""
    given = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    if "config" not in given:
        return TRANSCODER_RECIPE if "target_hook_point" in {name.replace("-", "_") for name in given} else RECIPE
    values = read_config_values(given["config"])
    checked = {name: value for name, value in values.items() if (name, value) != ("device", "auto")}
    if found := value_problems(checked, LanguageModelSAERunnerConfig):
        raise ValueError("\n".join([f"{given['config']}: these values are wrong", *found.values()]))
    hints = field_types(LanguageModelSAERunnerConfig)
    return {name: plain_value(value, hints[name]) for name, value in values.items()}


def with_words(values: dict[str, Any], verb: Any, device: str | None = None) -> dict[str, Any]:
    """Return the values of a config with those of the command line's own words: MODEL, DATASET, layers, device auto.

    `verb` has the flags of ModelAndText, and of a config. `device` is what "auto" means; None asks the machine.
    """
    if verb.layers is not None:
        hooks = [values["hook_point"], values.get("target_hook_point")]
        if isinstance(verb.layers, int) and "{layer}" not in str(hooks):
            raise ValueError(
                f"layers: found {verb.layers} with hook_point {values['hook_point']!r}, expected {{layer}} where the "
                "number goes; write for instance blocks.{layer}.hook_resid_post"
            )
        values["hook_point_layer"] = verb.layers
    elif verb.layer_stride != 1 and verb.hook_point_layer == 0:
        values["hook_point_layer"] = "all"
    if verb.model is not None:
        values["model_name"] = verb.model
    if verb.dataset is not None:
        values["dataset_path"] = verb.dataset
    if values["device"] == "auto":
        from sae_training.machine.device import automatic

        values["device"] = device or automatic()
    return values
