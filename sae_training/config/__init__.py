"""What a run is told: the configs, their checks, and the lists that describe several runs at once."""

from sae_training.config.cache import CacheActivationsRunnerConfig
from sae_training.config.run import LanguageModelSAERunnerConfig
from sae_training.config.types import Architecture, Dtype, SchedulerName

__all__ = ["Architecture", "CacheActivationsRunnerConfig", "Dtype", "LanguageModelSAERunnerConfig", "SchedulerName"]
