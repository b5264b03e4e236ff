"""Readers of other programs' autoencoder files, one file per format."""
