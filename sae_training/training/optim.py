"""The optimizer, and its schedules: each a pure function of the step, so that there is nothing to save or restore."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """adam, adam8bit, or signum (which uses the first of `betas`).

    They leave parameters and moments as they are in a step where their attribute `found_inf` (a scalar tensor) is 1.
    Adam goes over each parameter once, fused: on a CPU 3 to 10 times faster than a loop over tensor operations.
    """
    check_installed(name)
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
        case "adam8bit":
            from sae_training.training.adam8bit import Adam8bit

            return Adam8bit(parameters, lr=lr, betas=betas)
        case "signum":
            return Signum(parameters, lr=lr, momentum=betas[0])
        case other:
            raise ValueError(f"optimizer: found {other!r}, expected 'adam', 'adam8bit' or 'signum'.")


def check_installed(name: str) -> None:
    """ImportError, with what to install, if the optimizer `name` needs a package that is not there."""
    if name == "adam8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "optimizer: adam8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or use adam."
        )


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that the optimizer keeps of a parameter between steps (adam8bit's tables, the same for all, left out)."""
    state = optimizer.state[parameter]
    return {key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("qmap")}


class Signum(torch.optim.Optimizer):
    """Each step moves every number by the learning rate, along the sign of the running mean of its gradient.

    Bernstein et al. 2018 (arXiv 1802.04434). One moment instead of Adam's two. A latent that seldom fires moves as far
    as one that often does, which leaves few latents dead.
    """

    found_inf: torch.Tensor

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float) -> None:
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
