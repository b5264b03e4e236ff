"""What "auto" means, and what other numbers are worked out where a config leaves them open.

The learning rate is

    AUTO_LR / sqrt(d_sae / 2**14) / sqrt(max(1, steps / AUTO_LR_STEPS)), at most AUTO_LR_MAX:

measured on SmolLM2, d_sae 4608, 500k rows in 122 to 976 steps (docs/benchmarks.md). At 100,000 steps the rule gives
the 2e-4 / sqrt(d_sae / 2**14) that sparsify and dictionary_learning use for their long runs.
"""

from __future__ import annotations

import math

from sae_training.config.types import FIXED_K, InProportion

AUTO_LR = 3.7e-3
AUTO_LR_STEPS = 250
AUTO_LR_MAX = 1e-2
AUTO_WARM_UP_SHARE = 0.25
AUTO_WARM_UP_MAX_STEPS = 1000


def auto_lr(d_sae: int | None, total_steps: int) -> float:
    """Return the learning rate; ValueError while d_sae is not known."""
    if d_sae is None:
        raise ValueError(needs_d_in("lr", "auto"))
    return min(AUTO_LR_MAX, AUTO_LR / math.sqrt(d_sae / 2**14 * max(1.0, total_steps / AUTO_LR_STEPS)))


def auto_lr_warm_up_steps(total_steps: int) -> int:
    """Return the steps of warm-up: a quarter of the run, at most 1000."""
    return min(AUTO_WARM_UP_MAX_STEPS, int(AUTO_WARM_UP_SHARE * total_steps))


def auto_auxk_coefficient(architecture: str) -> float:
    """Return the weight of the AuxK loss: 1/4 with a fixed k, else 0."""
    return 1 / 4 if architecture in FIXED_K else 0.0


def auto_auxk_k(d_in: int) -> int:
    """Return the power of two nearest to d_in / 2 on a log scale: 512 for 768, as in Gao et al. 2024."""
    return 2 ** round(math.log2(max(1, d_in / 2)))


IN_PROPORTION = ("n_batches_in_buffer", "n_eval_batches")
"""The fields whose defaults are in proportion to the run."""

BUFFER_SHARE = 3
EVALUATION_SHARE = 5


def batches_in_buffer(value: int, rows: int, rows_of_a_pass: int, rows_of_a_step: int) -> int:
    """Return an open n_batches_in_buffer, with which the buffer holds a third of the run's `rows` at most.

    It never holds less than two steps, because a step takes half of it at most, nor more than the default.
    """
    needed = -(-2 * rows_of_a_step // rows_of_a_pass)
    return InProportion(min(value, max(1, needed, rows // BUFFER_SHARE // rows_of_a_pass)))


def eval_batches(value: int, passes: int, passes_of_a_batch: int) -> int:
    """Return an open n_eval_batches, with which an evaluation takes a fifth of the run's `passes` at most.

    The run's passes are those it is trained on and those of the evaluation. One batch is the least.
    """
    return InProportion(min(value, max(1, passes // ((EVALUATION_SHARE - 1) * passes_of_a_batch))))


def needs_d_in(field: str, value: str | None) -> str:
    """Return the message for a number that cannot be worked out without d_in."""
    return (
        f"{field}: found {value!r} with d_in None, expected a known d_in to work it out; "
        "set d_in, or load the model first and replace d_in by its width"
    )
