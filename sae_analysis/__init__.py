"""Exploring trained autoencoders. Imports sae_training, never the other way round."""
