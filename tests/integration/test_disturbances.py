"""The short version of `scripts/benchmarks/disturb_runs.py`, which disturbs runs at random moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "disturb_runs.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "what"), [("train", ["kill", "power cut"]), ("cache", ["term", "full disk"])])
def test_disturbed_runs_end_with_the_bits_of_an_undisturbed_one(kind: str, what: list[str], tmp_path: Path) -> None:
    words = ["--runs", "1", "--kinds", kind, "--disturbances", *what, "--seed", "3"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)["found"]
    (run,) = found["runs"]
    assert found["same bytes"] and run["disturbances"] and not run["different"]
    if not json.loads(done.stdout)["mounts"]:
        pytest.skip("cannot mount a disk here: signals alone were checked")
