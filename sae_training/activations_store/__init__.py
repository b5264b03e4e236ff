"""From passes of the language model, or a cache of them, to shuffled batches of activations."""

from sae_training.activations_store.store import ActivationsStore

__all__ = ["ActivationsStore"]
