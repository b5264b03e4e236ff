"""The optimizer, and its schedules: each a pure function of the step, so that there is nothing to save or restore."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any, get_args

import torch

from sae_training.config_types import SchedulerName

SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)
WITH_WARM_UP = ("constantwithwarmup", "linearwarmupdecay", "cosineannealingwarmup")


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
            from sae_training.adam8bit import Adam8bit  # its package is an extra, which most installations lack

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


def warm_up_factor(step: int, warm_up_steps: int) -> float:
    """1/W at step 0, 2/W at step 1, ... 1 from step W - 1 on; always 1 without warm-up."""
    return min(1.0, (step + 1) / warm_up_steps) if warm_up_steps > 0 else 1.0


def annealed_k(step: int, k: int, d_sae: int, anneal_steps: int) -> int:
    """Active latents per row in a step: in a line from min(d_sae / 2, 8k) at step 0 to k from `anneal_steps` on."""
    if step >= anneal_steps:
        return k
    start = max(k, min(d_sae // 2, 8 * k))
    return round(start + (k - start) * step / anneal_steps)


def lr_factor(
    step: int,
    scheduler_name: str,
    total_steps: int,
    warm_up_steps: int = 0,
    decay_steps: int = 0,
    end_factor: float = 0.1,
    n_restart_cycles: int = 1,
) -> float:
    """What the learning rate is multiplied by in optimizer step `step` (0 is the first, total_steps - 1 the last).

    | name                        | after the warm-up, over the steps left                                    |
    |-----------------------------|---------------------------------------------------------------------------|
    | constant                    | 1 (no warm-up)                                                            |
    | constantwithwarmup          | 1                                                                         |
    | linearwarmupdecay           | a line from 1 to 0, reached one step after the last                       |
    | cosineannealing             | half a cosine from 1 to `end_factor` (no warm-up)                         |
    | cosineannealingwarmup       | half a cosine from 1 to `end_factor`                                      |
    | cosineannealingwarmrestarts | `n_restart_cycles` such half cosines, each from 1 again (no warm-up)      |

    The warm-up rises from 1 / warm_up_steps to 1. Whatever the schedule, the last `decay_steps` steps also fall in a
    line to 0. Beyond the last step the factor stays where the schedule ended. None is the old name of "constant".
    """
    name = scheduler_name or "constant"
    if name not in SCHEDULERS:
        raise ValueError(f"lr_scheduler_name: found {name!r}, expected one of {', '.join(SCHEDULERS)}.")
    warm_up_steps = warm_up_steps if name in WITH_WARM_UP else 0
    main_steps = total_steps - decay_steps
    decay = min(1.0, max(0.0, (total_steps - step) / decay_steps)) if decay_steps > 0 else 1.0
    if step < warm_up_steps:
        return warm_up_factor(step, warm_up_steps) * decay
    position = min(step, main_steps) - warm_up_steps
    length = max(main_steps - warm_up_steps, 1)
    return main_factor(name, position, length, end_factor, n_restart_cycles) * decay


def main_factor(name: str, position: int, length: int, end_factor: float, n_cycles: int) -> float:
    """The factor `position` steps into a main part of `length` steps."""
    progress = min(1.0, max(0.0, position / length))
    match name:
        case "linearwarmupdecay":
            return 1.0 - progress
        case "cosineannealing" | "cosineannealingwarmup":
            return cosine(progress, end_factor)
        case "cosineannealingwarmrestarts":
            if progress == 1.0:  # beyond the end: the last cycle's end, not the start of one more
                return end_factor
            return cosine(progress * n_cycles % 1.0, end_factor)
        case _:
            return 1.0


def cosine(progress: float, end_factor: float) -> float:
    return end_factor + (1 - end_factor) * 0.5 * (1 + math.cos(math.pi * progress))
