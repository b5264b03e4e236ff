"""Whether activations are finite, asked where they come in: from the language model, from a cache, from a checkpoint.

Rows that are infinite or NaN train nothing, and evaluations on them say nothing. Their cause is the language model, or
the precision in which it computes: float16 ends at 65504, which outliers of the residual stream pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_training.language_model.load import LanguageModel
from sae_training.machine.precision import dtype_name

Explain = Callable[[str, str], str]
"""Makes the message for a hook and what it holds: "inf", "NaN" or "inf and NaN"."""


class NonFiniteActivations(ValueError):
    """Activations are infinite or NaN. Nothing was trained on them, written or evaluated."""


def non_finite(activations: Tensor) -> Tensor:
    """Return bool (2,): whether any value is infinite, and whether any is NaN. No GPU is waited for."""
    if activations.numel() == 0:
        return torch.zeros(2, dtype=torch.bool, device=activations.device)
    # On the CPU the extremes, which are NaN if any value is, take a twentieth of the time of a mask.
    if activations.device.type == "cpu" and torch.stack(activations.aminmax()).isfinite().all():
        return torch.zeros(2, dtype=torch.bool)
    return torch.stack([activations.isinf().any(), activations.isnan().any()])


def check_finite(activations: Mapping[str, Tensor], explain: Explain) -> None:
    """Raise NonFiniteActivations if any activations, by their hook, are not finite. Waits for the device once."""
    raise_if(list(activations), torch.stack([non_finite(of_hook) for of_hook in activations.values()]), explain)


def raise_if(hooks: list[str], flags: Tensor, explain: Explain) -> None:
    """Raise NonFiniteActivations for the first of `hooks` whose flags (hooks, 2) are set; what `non_finite` returns."""
    for hook, has in zip(hooks, flags.tolist(), strict=True):
        if any(has):
            found = " and ".join(kind for kind, present in zip(("inf", "NaN"), has, strict=True) if present)
            raise NonFiniteActivations(explain(hook, found))


class PassesChecked:
    """Notes for each pass whether its rows are finite; `check` says it, once the passes are done.

    Until then nothing waits for a GPU. Flags that are set stay noted, so that no later `check` lets the rows through.
    """

    def __init__(self, explain: Explain) -> None:
        self.explain = explain
        self.noted: deque[tuple[list[str], Tensor, Any]] = deque()
        """Of each pass the hooks, their flags (hooks, 2) on the CPU, and the event after which these are there."""

    def note(self, rows: Mapping[str, Tensor]) -> None:
        flags = torch.stack([non_finite(of_hook) for of_hook in rows.values()])
        done = None
        if flags.device.type == "cuda":
            device, flags = flags.device, flags.to("cpu", non_blocking=True)
            done = torch.cuda.current_stream(device).record_event()
        self.noted.append((list(rows), flags, done))

    def check(self) -> None:
        """Raise NonFiniteActivations if the rows of a pass so far are not finite; wait for the passes, not for more."""
        while self.noted:
            hooks, flags, done = self.noted[0]
            if done is not None:
                done.synchronize()
            raise_if(hooks, flags, self.explain)
            self.noted.popleft()


# ---------------------------------------------------------------------------------------------------------- messages


def explain_live(model: LanguageModel) -> Explain:
    """Return what makes the message for activations that `model` computes."""

    def explain(hook: str, found: str) -> str:
        weight = non_finite_weight(model)
        return f"activations of {hook} hold {found}: {cause(found, dtype_name(model.cfg.dtype), weight)}"

    return explain


def explain_cached(folder: Any, lm_dtype: str) -> Explain:
    """Return what makes the message for activations in the cache `folder`, computed in `lm_dtype`."""

    def explain(hook: str, found: str) -> str:
        return (
            f"activations of {hook} hold {found}: {cause(found, lm_dtype, None)}. They are in the cache {folder}; "
            "delete it and write it again so."
        )

    return explain


def cause(found: str, dtype: str, weight: str | None) -> str:
    """Say why activations that a language model computes in `dtype` hold `found`, and what to do.

    `weight` names a weight of it that is not finite.
    """
    if weight is not None and dtype != "float16":
        return (
            f"the language model's weight {weight} is not finite; load a sound copy of the model (model_name), because "
            f"lm_dtype ({dtype}) is not the reason"
        )
    if dtype == "float16":
        overflow = "" if "inf" in found else ", a value beyond it becomes inf, and inf - inf NaN"
        there = "" if weight is None else f" (in float16 the weight {weight} is not finite either)"
        return f"float16 ends at 65504{overflow}; set lm_dtype to bfloat16 or float32{there}"
    largest = torch.finfo(getattr(torch, dtype)).max
    return (
        f"{dtype} reaches {largest:.2g} and its weights are finite, so the model itself computes them; look at its "
        "layers before this one, choose an earlier hook_point, or another model_name"
    )


def non_finite_weight(model: LanguageModel) -> str | None:
    """Return the name of the first weight that is not finite, if there is one."""
    for name, weight in model.named_parameters():
        if non_finite(weight.detach()).any():
            return name.replace("_original_component.", "")  # which a bridge puts into the names of the model's own
    return None
