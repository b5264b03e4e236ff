"""The config of writing activations to disk: where they come from, and the files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_training.config.checks import checked_names
from sae_training.config.fields import Source
from sae_training.config.rules import check
from sae_training.config.types import Device, NotNegative, Positive


@checked_names
@dataclass(kw_only=True)
class CacheActivationsRunnerConfig(Source):
    """Everything that one cache of activations needs to know."""

    # Cache

    cached_activations_path: str = "activations"
    """Folder to write; an unfinished one of the same config is continued."""

    total_training_tokens: Positive[int] = 2_000_000
    """Tokens that go through the model, in whole passes; those excluded as special are not written."""

    form: Literal["rows", "contexts", "both"] = "rows"
    """rows: shuffled over the whole cache, for training. contexts: in the order of the text, for analysis."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Precision on disk; auto is that of the model, which loses nothing; int8 has a scale for each row."""

    shard_size_mb: Positive[int] = 256
    """Size of a file, about; writing holds up to three of them in memory."""

    seed: NotNegative[int] = 42
    """Seed of the shuffle."""

    parallel_timeout_minutes: Positive[float] = 30
    """How long a process waits for the others, to come and in each pass."""

    device: Device = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        """Check every field; ValueError with all problems at once."""
        check(self)
