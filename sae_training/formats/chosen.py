"""Which of several autoencoders is the one at the place that a caller names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_training.config.types import UNKNOWN
from sae_training.formats.hook_names import layer_of, transformer_lens_name
from sae_training.formats.loaded import Given, Loaded


def the_one(found: Mapping[str, Loaded], path: Path, given: Given) -> Loaded:
    """The only one that is at the place that `given` names, if it names one. ValueError that lists them otherwise.

    One whose files do not name its place is taken to be there if there is no other.
    """
    wanted = [loaded for loaded in found.values() if is_at(loaded.values, given)]
    if not wanted and len(found) == 1:
        wanted = [loaded for loaded in found.values() if is_at(loaded.values, given) is None]
    if len(wanted) == 1:
        return placed(wanted[0], given)
    unread = [(name, loaded.problem) for name, loaded in found.items() if loaded.problem is not None]
    places = [f"{name} ({place_in_words(loaded)})" for name, loaded in list(found.items())[:20]]
    shown = ", ".join([*places, "..."][: len(found)])
    raise ValueError(
        f"{path}: of the autoencoders there ({shown}) {len(wanted)} are at hook_point {given.hook_point}, layer "
        f"{given.layer}, expected one; change hook_point or layer, or call load_many."
        + "".join(f"\n{name} cannot be read: {problem}" for name, problem in unread[:5])
    )


def placed(loaded: Loaded, given: Given) -> Loaded:
    """What was chosen, at the place that `given` names where its files leave the place out."""
    is_known = loaded.values.get("hook_point") != UNKNOWN and "hook_point_layer" in loaded.values
    if not given.names_a_place or is_known or loaded.at is None:
        return loaded
    return dataclasses.replace(loaded.at(given), takes_norm_factor=loaded.takes_norm_factor)


def place_in_words(loaded: Loaded) -> str:
    if loaded.problem is not None:
        return "cannot be read"
    layer = loaded.values.get("hook_point_layer")
    place = loaded.values.get("hook_point")
    return f"{place} place of layer {layer}" if place == UNKNOWN and layer is not None else str(place)


def is_at(values: Mapping[str, Any], given: Given) -> bool | None:
    """Whether an autoencoder is at the place that `given` names, by its config; None if that does not say it."""
    if not given.names_a_place:
        return True
    hook_point = str(values.get("hook_point", UNKNOWN))
    layer = layer_of(hook_point)
    layer = values.get("hook_point_layer") if layer is None else layer
    if hook_point == UNKNOWN:
        wanted = {given.layer, layer_of(given.hook_point or "")} - {None}
        return wanted == {layer} if wanted and layer is not None else None
    hook_points = (hook_point, hook_point.replace("{layer}", str(layer)))
    wanted_hook = given.hook_point and transformer_lens_name(given.hook_point, values.get("model_name"))
    if wanted_hook is not None and wanted_hook not in hook_points:
        return False
    return None if given.layer is not None and layer is None else given.layer in (None, layer)
