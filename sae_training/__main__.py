"""`python -m sae_training` is the console script `sae-training`."""

from __future__ import annotations

import sys

from sae_training.cli import main

if __name__ == "__main__":
    sys.exit(main())
