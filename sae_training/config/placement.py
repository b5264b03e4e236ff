"""What the options of where the language model lies, and in how many bits, mean together."""

from __future__ import annotations

from collections.abc import Mapping

from sae_training.config.types import DEVICES, names_device

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The words of device_map by which accelerate spreads a model over all devices; any other word is one device."""

DeviceMap = str | dict[str, int | str]
"""A word for the whole model, or by name the parts of transformers' model, each with its device."""


def devices_of(device_map: DeviceMap | None) -> list[str]:
    """Return the devices that a map names, each once: none for a word that leaves them to accelerate."""
    if device_map is None or isinstance(device_map, str) and device_map in SPREADS:
        return []
    named = [device_map] if isinstance(device_map, str) else device_map.values()
    return list(dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else place for place in named))


def unknown_place(device_map: DeviceMap | None) -> str | None:
    """Refuse a map that is none, or puts a part where the model cannot run."""
    if device_map is None or isinstance(device_map, str) and device_map in SPREADS:
        return None
    if isinstance(device_map, str) and not names_device(device_map):
        words = ", ".join((*SPREADS, *DEVICES))
        return (
            f"device_map: found {device_map!r}, expected one of {words}, or devices by the parts of transformers' "
            'model, such as {"model.embed_tokens": 0, "model.layers.0": 0, ...}; change it'
        )
    if not device_map:
        return 'device_map: found an empty map, expected devices by the names of parts, "" for the whole; leave it out'
    for part, place in device_map.items() if isinstance(device_map, Mapping) else ():
        if place in ("disk", "meta"):
            return (
                f"device_map: found {place!r} for {part!r}, expected a device: TransformerLens computes with weights "
                "that are in memory; give the part a GPU, or the whole model the CPU"
            )
        if place < 0 if isinstance(place, int) else not names_device(place):
            return (
                f"device_map: found {place!r} for {part!r}, expected the number of a GPU or one of "
                f"{', '.join(DEVICES)}; change it"
            )
    places = devices_of(device_map)
    if "cpu" in places and len(places) > 1:
        return (
            f"device_map: found parts on cpu and on {', '.join(sorted({*places} - {'cpu'}))}, expected GPUs alone, or "
            "the CPU alone: accelerate keeps such a part's weights out of TransformerLens' reach; change it"
        )
    return None


def placed_and_processed(device_map: DeviceMap | None, load_in_8bit: bool, model_processing: str) -> str | None:
    """Refuse to fold and centre weights that are spread over devices, or are whole numbers."""
    if model_processing != "default":
        return None
    if load_in_8bit:
        return (
            "load_in_8bit: found True with model_processing default, expected none: weights in 8 bits cannot be folded "
            "and centred; set model_processing to none"
        )
    if device_map is not None:
        return (
            f"device_map: found {device_map!r} with model_processing default, expected none: TransformerLens folds and "
            "centres weights on one device, in float32; set model_processing to none"
        )
    return None


RULES = (unknown_place, placed_and_processed)
