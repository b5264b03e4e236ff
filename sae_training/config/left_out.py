"""What the files of other programs may leave out, and how a model is loaded: `formats.loaded.Given` as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_training.config.checks import field_types


@dataclass(kw_only=True)
class LeftOut:
    """Which of several autoencoders is meant, and what files may leave out."""

    model_name: str | None = None
    """Language model, in place of the one that the files name."""

    hook_point: str | None = None
    """Place that is read, if the files do not name it; of several autoencoders the one of this place."""

    layer: int | None = None
    """Of several autoencoders the one of this layer."""

    target_hook_point: str | None = None
    """Place that a transcoder predicts, if the files do not name it."""

    dataset_path: str | None = None
    """Text, in place of the one that the files name."""

    context_size: int | None = None
    """Tokens per context, in place of what the files say."""

    k: int | None = None
    """Active latents per token, if the files do not say it."""

    norm_factor: float | None = None
    """Factor that training multiplied activations with, if the files do not say it."""

    def said(self) -> dict[str, Any]:
        """Return what is given, by the names of the arguments of `SparseAutoencoder.load_from_pretrained`."""
        return {name: value for name in field_types(LeftOut) if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class Placed(LeftOut):
    """The same, and how the language model is loaded."""

    device_map: str | dict[str, int | str] | None = None
    """Where the language model's parts lie, in place of what the run had: auto, cpu, or JSON."""

    load_in_8bit: bool | None = None
    """Load the language model in 8 bits, or not, in place of what the run did."""

    def said(self) -> dict[str, Any]:
        """Return what is given, as `LeftOut.said`."""
        return {name: value for name in field_types(Placed) if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class Measured(Placed):
    """The same, and on how much text it is measured."""

    n_eval_batches: int | None = None
    """Held-out batches of store_batch_size contexts, in place of what the run had; 10 for other files."""

    def said(self) -> dict[str, Any]:
        """Return what is given, by the names of the arguments of `evaluate_run`."""
        amount = {} if self.n_eval_batches is None else {"n_eval_batches": self.n_eval_batches}
        return super().said() | amount
