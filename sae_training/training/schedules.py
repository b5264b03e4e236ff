"""Schedules: pure functions of the step, so that there is no state to save or restore."""

from __future__ import annotations

import math
from typing import get_args

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.types import SchedulerName

SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)

WITH_WARM_UP = ("constantwithwarmup", "linearwarmupdecay", "cosineannealingwarmup")


def warm_up_factor(step: int, warm_up_steps: int) -> float:
    """With W = `warm_up_steps`: 1/W at step 0, 2/W at step 1, ..., 1 from step W - 1 on. Always 1 for W = 0."""
    return min(1.0, (step + 1) / warm_up_steps) if warm_up_steps > 0 else 1.0


def annealed_k(step: int, k: int, d_sae: int, anneal_steps: int) -> int:
    """Active latents per row: falls linearly from min(d_sae / 2, 8k) at step 0 to k at `anneal_steps`, then stays k."""
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
    """The factor on the learning rate in optimizer step `step` (0 is the first, total_steps - 1 the last).

    | name                        | after the warm-up, over the steps left                                    |
    |-----------------------------|---------------------------------------------------------------------------|
    | constant                    | 1 (no warm-up)                                                            |
    | constantwithwarmup          | 1                                                                         |
    | linearwarmupdecay           | linear from 1 to 0, which it reaches one step after the last              |
    | cosineannealing             | half a cosine from 1 to `end_factor` (no warm-up)                         |
    | cosineannealingwarmup       | half a cosine from 1 to `end_factor`                                      |
    | cosineannealingwarmrestarts | `n_restart_cycles` such half cosines, each from 1 again (no warm-up)      |

    The warm-up rises from 1 / warm_up_steps to 1. With any schedule, the factor also falls linearly to 0 over the last
    `decay_steps` steps. After the last step it stays where the schedule ended. None is the old name of "constant".
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


def lr_at(cfg: LanguageModelSAERunnerConfig, step: int) -> float:
    """Return the learning rate of a run in its step number `step`, from 0."""
    factor = lr_factor(
        step,
        cfg.lr_scheduler_name,
        cfg.total_training_steps,
        warm_up_steps=cfg.resolved_lr_warm_up_steps,
        decay_steps=cfg.lr_decay_steps,
        end_factor=cfg.lr_end_value / cfg.resolved_lr,
        n_restart_cycles=cfg.n_restart_cycles,
    )
    return cfg.resolved_lr * factor


def main_factor(name: str, position: int, length: int, end_factor: float, n_cycles: int) -> float:
    """The factor `position` steps into a main part of `length` steps."""
    progress = min(1.0, max(0.0, position / length))
    match name:
        case "linearwarmupdecay":
            return 1.0 - progress
        case "cosineannealing" | "cosineannealingwarmup":
            return cosine(progress, end_factor)
        case "cosineannealingwarmrestarts":
            if progress == 1.0:  # after the last step: the end of the last cycle, not the start of another
                return end_factor
            return cosine(progress * n_cycles % 1.0, end_factor)
        case _:
            return 1.0


def cosine(progress: float, end_factor: float) -> float:
    return end_factor + (1 - end_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps (None or 0: never) happens after `step` steps."""
    return every is not None and every > 0 and step % every == 0


def snapshot_steps(cfg: LanguageModelSAERunnerConfig) -> set[int]:
    """`n_checkpoints` steps that divide the run into equal parts; at the end of the last part is the final save."""
    return {cfg.total_training_steps * i // (cfg.n_checkpoints + 1) for i in range(1, cfg.n_checkpoints + 1)} - {0}
