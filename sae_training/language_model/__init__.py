"""The frozen language model: loading it, finding a place in it, reading and replacing activations there."""

import logging

# Where bitsandbytes is installed, transformer_lens imports it, and it warns about kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
