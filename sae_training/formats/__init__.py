"""An autoencoder on disk: our own files, and those of other programs."""
