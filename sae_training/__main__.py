"""The console script `sae-training`, and `python -m sae_training`."""

from __future__ import annotations

import sys

from sae_training.machine.entry import run_cli


def main() -> int:
    return run_cli("sae_training")


if __name__ == "__main__":
    sys.exit(main())
