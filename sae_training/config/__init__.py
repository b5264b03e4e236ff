"""What a run is told: the configs, their checks, and the lists that describe several runs at once.

    types -> checks -> fields -> sweep -> rules -> run, cache, toy -> io -> files

Fields without checks lie below, classes with checks above; each file imports only those before it.
"""

from sae_training.config.cache import CacheActivationsRunnerConfig
from sae_training.config.run import LanguageModelSAERunnerConfig
from sae_training.config.types import Architecture, Dtype, SchedulerName

__all__ = ["Architecture", "CacheActivationsRunnerConfig", "Dtype", "LanguageModelSAERunnerConfig", "SchedulerName"]
