"""The sparse autoencoder: its definition, its losses, where its weights start, and its conversions."""

from sae_training.sparse_autoencoder.crosscoder import Crosscoder
from sae_training.sparse_autoencoder.definition import ForwardOutput, SparseAutoencoder

__all__ = ["Crosscoder", "ForwardOutput", "SparseAutoencoder"]
