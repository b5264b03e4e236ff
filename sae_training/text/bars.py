"""Show the progress bars of `datasets` where a person sees them; a log file has the lines of the phases instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets import config as datasets_config

from sae_training.machine.phases import shows_bars


@contextmanager
def bars_of_datasets(wanted: bool = True) -> Iterator[None]:
    """In here `datasets` shows bars only if they are `wanted` and there is a terminal or a notebook that shows them.

    HF_DATASETS_DISABLE_PROGRESS_BARS, where it is set, decides alone: `datasets` lets nothing else.
    """
    is_free = datasets_config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
    silenced = is_free and not (wanted and shows_bars()) and not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()
