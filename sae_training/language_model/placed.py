"""Loads a model of transformers in parts on several devices (`device_map`), or with weights in 8 bits (`load_in_8bit`).

transformers and accelerate put the weights where they belong while they read them, so that no device ever holds all.
They are loaded in the precision that they run in, because accelerate's hooks and 8 bits allow no processing in float32
that is cast afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from sae_training.config.placement import SPREADS, DeviceMap, devices_of, placed_and_processed, unknown_place
from sae_training.machine.device import checked
from sae_training.machine.errors import first_line
from sae_training.parallel.ranks import is_launched, own_gpus


@dataclass(frozen=True)
class Placement:
    """Where a model is to lie, and how."""

    device: str
    """Of the whole model, without a map."""
    device_map: DeviceMap | None = None
    load_in_8bit: bool = False
    dtype: torch.dtype = torch.float32
    """Of the weights that are not in 8 bits."""

    @property
    def is_plain(self) -> bool:
        """Whether the whole model is loaded in float32 and moved to one device, as ever."""
        return self.device_map is None and not self.load_in_8bit

    def check(self, model_processing: str) -> None:
        """Raise ValueError for what cannot be loaded here, before anything is read."""
        problem = unknown_place(self.device_map)
        if problem := problem or placed_and_processed(self.device_map, self.load_in_8bit, model_processing):
            raise ValueError(problem)
        for place in devices_of(self.device_map):
            checked(place, "device_map")
        if self.load_in_8bit and find_spec("bitsandbytes") is None:
            raise ValueError(
                "load_in_8bit: found True without the package bitsandbytes, which computes in 8 bits; install it "
                "(pip install bitsandbytes, or the extra adam8bit), or set load_in_8bit to False."
            )

    def arguments(self) -> dict[str, Any]:
        """Return what transformers' from_pretrained is told."""
        if self.is_plain:
            return {"dtype": torch.float32}
        told: dict[str, Any] = {"dtype": self.dtype, "device_map": self.device_map or {"": self.device}}
        if self.device_map in SPREADS and is_launched() and (gpus := own_gpus()):
            told["max_memory"] = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}
        if self.load_in_8bit:
            told["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return told

    def explained(self, error: ValueError) -> ValueError:
        """Return an error of accelerate's about the map, with what it is about."""
        if self.device_map is None:
            return error
        return ValueError(
            f"device_map: found {self.device_map!r}, with which transformers could not load the model "
            f"({first_line(error)}); expected auto, or a device for each of its parts, by their names in transformers."
        )

    def check_in_reach(self, model: nn.Module) -> None:
        """Raise ValueError if accelerate has found no room for a part, and keeps its weights elsewhere.

        TransformerLens computes with the weights themselves, which such a part gets at each call from a disk.
        """
        places: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
        rest = ("cpu", "disk", "meta") if len({*places.values()} - {"disk", "meta"}) > 1 else ("disk", "meta")
        if left := [part for part, place in places.items() if place in rest]:
            raise ValueError(
                f"device_map: found {self.device_map!r} with a model that does not fit: accelerate left {left[0]} and "
                f"{len(left) - 1} more of its parts on {places[left[0]]}, expected room for all; take more GPUs, a "
                "smaller lm_dtype or load_in_8bit, or set device_map to cpu."
            )


def is_in_8_bits(model: Any) -> bool:
    """Return whether the weights of a language model's linear layers are 8-bit numbers."""
    return bool(getattr(getattr(model, "original_model", None), "is_loaded_in_8bit", False))
