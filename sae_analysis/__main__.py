"""`python -m sae_analysis` is the console script `sae-analysis`."""

import sys

from sae_analysis.cli import main

if __name__ == "__main__":
    sys.exit(main())
