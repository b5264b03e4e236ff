"""Trains one run of a wandb sweep, whose config comes from the flags that `wandb agent` gives.

python scripts/sweep_run.py --lr=0.0004 --k=32 --model_name=gpt2-small ...

Each config field is a flag, with the defaults of `python -m sae_training train`; see scripts/sweep.yaml.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from sae_training.cli import parse_train
from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.lm_runner import language_model_sae_runner
from sae_training.machine.interrupt import without_traceback


def config(flags: Sequence[str]) -> LanguageModelSAERunnerConfig:
    """Return the config of one run of the sweep, whose folder is <name>-<wandb run id>.

    All runs of a sweep share the flags that are not swept, run_name among them. Without the id, an agent's second run
    would therefore find the first run's folder.
    """
    cfg = parse_train(flags)
    name = cfg.resolved_run_name
    if run_id := os.environ.get("WANDB_RUN_ID"):
        name = f"{name}-{run_id}"
    return dataclasses.replace(cfg, run_name=name, log_to_wandb=True)


def main(flags: Sequence[str]) -> None:
    with without_traceback():  # the agent stops a run that the sweep gives up
        language_model_sae_runner(config(flags))


if __name__ == "__main__":
    main(sys.argv[1:])
