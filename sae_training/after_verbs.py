"""The verbs on what a run has left: `sync` sends it to wandb, `reproduce` trains it once more."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, assert_never

from tyro.conf import Positional, arg

from sae_training.flags import Common
from sae_training.machine.phases import phase

RunFolder = Annotated[Path, Positional, arg(metavar="RUN")]


@dataclass(kw_only=True)
class Sync(Common):
    """Send to Weights & Biases what it lacks of a run: steps, histograms and weights.

    A run whose wandb was off, offline or cut off appears whole. What is there is not sent again.
    """

    run: RunFolder
    """Run folder."""

    offline: bool = False
    """Write files into the run's folder, for `wandb sync`, and send nothing."""


@dataclass(kw_only=True)
class Reproduce(Common):
    """Train a run once more, and say whether its weights are the same bits; if not, what differs.

    Same bits end with exit code 0, others with 1. What differs before it starts, as versions and processor, is said.
    """

    run: RunFolder
    """Run folder."""

    run_name: str | None = None
    """Name of the new run, beside the old one; None is that of the old one with -again."""


AfterVerb = Sync | Reproduce


def carry_out_after_verb(verb: AfterVerb) -> None:
    match verb:
        case Sync():
            with phase("starting"):
                from sae_training.run.wandb_sync import sync
            for line in sync(verb.run, verb.offline):
                sys.stdout.write(f"{line}\n")
        case Reproduce():
            with phase("starting"):
                from sae_training.reproduce import reproduce
            reproduce(verb.run, verb.run_name)
        case _:
            assert_never(verb)
