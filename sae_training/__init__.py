"""Trains sparse autoencoders on the activations of language models."""

__version__ = "0.1.0"
