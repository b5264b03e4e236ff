"""The threads that a process computes with: how they wait for each other."""

from __future__ import annotations

import os

OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What a user sets to choose how threads wait."""


def wait_passively() -> None:
    """Let threads that wait for others sleep, unless the user has chosen how they wait.

    By default the threads of OpenMP spin for milliseconds. Two processes on one machine then take each other's time:
    docs/reliability.md has the figures. OpenMP reads this once, when torch is imported, so it must be set before.
    """
    if not any(name in os.environ for name in OWN_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
