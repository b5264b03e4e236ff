"""The memory plan against what real runs hold, and a run that is refused for lack of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_training.config.io import config_to_dict
from sae_training.lm_runner import run_config
from sae_training.run import memory_plan
from sae_training.run.memory_plan import NotEnoughMemory

# Prints what the plan says that the run needs beyond what the process holds before it, and what it came to hold.
# The peak is VmHWM: getrusage's ru_maxrss begins at the size of the process that started this one.
RUN = """
import json, re, sys
from pathlib import Path
from sae_training import lm_runner
from sae_training.config.io import config_from_dict

plans = []
lm_runner.check_memory = lambda plan, cfg, n_saes: plans.append(plan)
lm_runner.run_config(config_from_dict(json.loads(Path(sys.argv[1]).read_text())))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"planned": plans[0].needed, "held": peak - plans[0].in_use}))
"""

LARGE: dict[str, dict[str, Any]] = {
    "weights and moments, and their copy": {
        "architecture": "topk",
        "k": 32,
        "expansion_factor": 800,
        "total_training_tokens": 256,
        "checkpoint_every_steps": 2,
    },
    "dense codes of a batch": {
        "expansion_factor": 64,
        "train_batch_size": 2048,
        "n_batches_in_buffer": 140,
        "total_training_tokens": 8192,
    },
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", LARGE)
def test_plan_is_near_the_peak_of_a_run_that_holds_hundreds_of_megabytes(
    case: str, small_config: Callable, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_to_dict(small_config(**LARGE[case]))))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] > 250 * 2**20
    assert 0.85 < found["held"] / found["planned"] < 1.15, found


def test_run_that_cannot_fit_is_not_started(
    small_config: Callable, demo_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_plan, "memory_of", lambda device: (2**30, 2**20))
    with pytest.raises(NotEnoughMemory, match="memory: this run needs"):
        run_config(small_config(), demo_model)
    assert not (tmp_path / "runs").exists()
