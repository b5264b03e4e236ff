"""Trains sparse autoencoders on the activations of language models."""

from sae_training.machine.threads import wait_passively

__version__ = "0.1.0"

wait_passively()  # before any part of the package imports torch
