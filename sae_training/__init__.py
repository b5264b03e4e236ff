"""Trains sparse autoencoders on the activations of language models."""

import logging

# Where bitsandbytes is installed, transformers imports it, and it warns about kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
