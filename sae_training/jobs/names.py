"""Print the names of jobs, a line each, for shells that complete them: python -m sae_training.jobs.names [RUN_DIR]."""

from __future__ import annotations

import sys
from pathlib import Path

from sae_training.jobs.found import RUN_DIR, places_in

if __name__ == "__main__":
    sys.stdout.writelines(f"{name}\n" for name, _ in places_in(Path(*sys.argv[1:2] or [RUN_DIR])))
