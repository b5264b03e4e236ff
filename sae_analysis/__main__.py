"""The console script `sae-analysis`, and `python -m sae_analysis`."""

from __future__ import annotations

import sys

from sae_training.machine.entry import run_cli


def main() -> int:
    return run_cli("sae_analysis")


if __name__ == "__main__":
    sys.exit(main())
