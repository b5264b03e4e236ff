"""Where a console script begins: before anything that takes long to import."""

from __future__ import annotations

import importlib
import sys


def run_cli(package: str) -> int:
    """Run one command of `package` and return the exit code.

    Ctrl-C is told in a line also while the program is being imported, which comes before its own handling.
    """
    try:
        cli = importlib.import_module(f"{package}.cli")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before it had begun.\n")
        return 130
    return cli.main()
