"""The optimizers: Adam, Adam with moments in 8 bits, and Signum."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from sae_training.training.adam8bit import make_adam8bit


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimizer of `parameters`, or groups of them, named adam, adam8bit or signum (only the first of `betas`).

    In a step where its attribute `found_inf` (a scalar tensor) is 1, it leaves parameters and moments as they are. Adam
    is fused, one pass over each parameter: on a CPU 3 to 10 times faster than a loop over tensor operations.
    """
    check_installed(name)
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
        case "adam8bit":
            return make_adam8bit(parameters, lr, betas)
        case "signum":
            return Signum(parameters, lr=lr, momentum=betas[0])
        case other:
            raise ValueError(f"optimizer: found {other!r}, expected 'adam', 'adam8bit' or 'signum'.")


def check_installed(name: str) -> None:
    """Raise ImportError, saying what to install, if the optimizer `name` needs a package that is not installed."""
    if name == "adam8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "optimizer: adam8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or use adam."
        )


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the optimizer keeps for a parameter between steps, without adam8bit's tables, which are the same for all."""
    state = optimizer.state[parameter]
    return {key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("qmap")}


def step_unless(not_finite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Do a step of an optimizer that `make_optimizer` made; none where the scalar `not_finite` is true.

    The device leaves it out by itself, without being waited for. Only mps is asked: its fused Adam takes `found_inf`
    and does not read it (torch 2.13).
    """
    if not_finite.is_mps and isinstance(optimizer, torch.optim.Adam) and not_finite.item():
        return
    # Where this attribute is 1, the optimizer leaves parameters and moments as they are.
    setattr(optimizer, "found_inf", not_finite.float())  # noqa: B010 - not declared, so pyright wants it so
    optimizer.step()


class Signum(torch.optim.Optimizer):
    """Moves every number by the learning rate along the sign of the running mean of its gradient.

    Source: Bernstein et al. 2018 (arXiv 1802.04434). It keeps one moment, Adam two. A latent that seldom fires moves as
    far as one that often fires, which leaves few latents dead.
    """

    found_inf: torch.Tensor

    def __init__(self, parameters: Any, lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closure here
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"]
                found_inf = getattr(self, "found_inf", None)
                gradient = parameter.grad if found_inf is None else torch.where(found_inf > 0, mean, parameter.grad)
                mean.lerp_(gradient, 1 - group["momentum"])
                kept = 1.0 if found_inf is None else 1 - found_inf
                parameter.sub_(mean.sign().mul_(group["lr"] * kept))
