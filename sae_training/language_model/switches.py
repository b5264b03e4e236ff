"""Turns on what TransformerLens computes only on request: the hook points that cost memory whether read or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SWITCHES = {
    "hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
}
"""The switch of the model's config that each of these hook points needs, by the last part of its name."""

EXCLUDES = {"use_split_qkv_input": "use_attn_in", "use_attn_in": "use_split_qkv_input"}


def switch_on(model: Any, hook_point: str, field: str = "hook_point") -> None:
    """Let `model` (HookedTransformer or TransformerBridge) compute `hook_point`, if that has a switch, from now on.

    It changes `model` in place. Raise ValueError, which names the config field `field`, if the model cannot do it.
    """
    switch = SWITCHES.get(hook_point.rpartition(".")[2])
    if switch is None or is_on(model, switch):
        return
    other = EXCLUDES.get(switch)
    if other is not None and is_on(model, other):
        names = ", ".join(name for name, needed in SWITCHES.items() if needed == other)
        raise ValueError(
            f"{field}: found {hook_point}, but this model computes {names} already, and TransformerLens cannot do both "
            f"at once; use a run, and a model, of its own, or call set_{other}(False) on the model before."
        )
    try:
        getattr(model, f"set_{switch}")(True)
    except (AttributeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{field}: {hook_point} needs {switch}, which this model cannot do ({error}); choose another hook."
        ) from error


@contextmanager
def switches_restored(model: Any) -> Iterator[None]:
    """Turn off at the end what has been turned on in here."""
    off = {switch for switch in SWITCHES.values() if not is_on(model, switch)}
    try:
        yield
    finally:
        for switch in off:
            if is_on(model, switch):
                getattr(model, f"set_{switch}")(False)


def is_on(model: Any, switch: str) -> bool:
    return bool(getattr(model.cfg, switch, False))
