"""The console script `sae-analysis`, and `python -m sae_analysis`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command and return the exit code. Ctrl-C is told in a line also while the program is being imported."""
    try:
        from sae_analysis.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before it had begun.\n")
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
