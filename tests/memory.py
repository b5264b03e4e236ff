"""The memory that loading a file takes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOADING = """
import resource, sys
from sae_training.sparse_autoencoder import SparseAutoencoder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
held = peak()
sae = SparseAutoencoder.load_from_pretrained(sys.argv[1])
print((peak() - held) / sum(p.nbytes for p in sae.parameters()))
"""


def of_loading(path: Path) -> float:
    """Peak beyond what the process held before, relative to the weights."""
    done = subprocess.run([sys.executable, "-c", LOADING, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)
