"""Training on synthetic rows whose dictionary is known, and scores of how much of it is found."""

from sae_training.config.toy import SAEToyModelRunnerConfig
from sae_training.toy_model_runner.runner import toy_model_sae_runner

__all__ = ["SAEToyModelRunnerConfig", "toy_model_sae_runner"]
