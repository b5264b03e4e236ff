"""The verbs on what a run has left: `sync` sends it to wandb, `reproduce` trains it once more; what `eval` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, assert_never

from tyro.conf import Positional, arg

from sae_training.flags import InRunDir
from sae_training.jobs.found import folder_named
from sae_training.machine.phases import phase

RunFolder = Annotated[Path, Positional, arg(metavar="RUN")]


@dataclass(kw_only=True)
class Sync(InRunDir):
    """Send to Weights & Biases what it lacks of a run: steps, histograms and weights.

    A run whose wandb was off, offline or cut off appears whole. What is there is not sent again.
    """

    run: RunFolder
    """Name of a run, or its folder."""

    offline: bool = False
    """Write files into the run's folder, for `wandb sync`, and send nothing."""


@dataclass(kw_only=True)
class Reproduce(InRunDir):
    """Train a run once more, and say whether its weights are the same bits; if not, what differs.

    Same bits end with exit code 0, others with 1. What differs before it starts, as versions and processor, is said.
    """

    run: RunFolder
    """Name of a run, or its folder."""

    run_name: str | None = None
    """Name of the new run, beside the old one; None is that of the old one with -again."""


AfterVerb = Sync | Reproduce


def carry_out_after_verb(verb: AfterVerb) -> None:
    folder = folder_named(verb.run, verb.run_dir)
    match verb:
        case Sync():
            with phase("starting"):
                from sae_training.run.wandb_sync import sync
            for line in sync(folder, verb.offline):
                sys.stdout.write(f"{line}\n")
        case Reproduce():
            with phase("starting"):
                from sae_training.reproduce import reproduce
            reproduce(folder, verb.run_name)
        case _:
            assert_never(verb)


def evaluation_in_words(figures: Mapping[str, float], run: Path, **said: Any) -> str:
    """Return the table of an evaluation, and what its figures are over. `said`: what its flags say."""
    from sae_training.report.in_words import BASE, notes
    from sae_training.run.remarks import record_of

    record = record_of(figures, run, **said)
    shown = {name: value for name, value in record.items() if not name.startswith(BASE) and name != "remarks"}
    return table(shown) + "".join(f"{note}\n" for note in notes(record))


def table(values: Mapping[str, object]) -> str:
    """Return names and values in two columns; floats have four digits."""
    width = max(map(len, values), default=0)
    shown = {n: f"{v:.4g}" if isinstance(v, float) else str(v) for n, v in values.items()}
    return "".join(f"{name:<{width}}  {text}\n" for name, text in shown.items())
