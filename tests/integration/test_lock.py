"""The lock of a run folder, held by another process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sae_training
from sae_training.config.io import config_to_dict
from sae_training.machine.lock import InUse
from sae_training.run.folder import RunFolder

HOLD = """
import json, sys
from pathlib import Path
from sae_training.config.io import config_from_dict
from sae_training.run.folder import RunFolder

folder = RunFolder(Path(sys.argv[1]), config_from_dict(json.loads(sys.argv[2])))
print("held", flush=True)
if sys.stdin.readline():
    folder.write_status("training", step=2)
    print("status", flush=True)
sys.stdin.read()
"""


def test_folder_is_refused_while_another_process_holds_it_and_free_once_that_is_killed(
    small_config: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with RunFolder(path, small_config()) as folder:  # the process that began the run, and died
        folder.write_status("training", step=1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), json.dumps(config_to_dict(small_config()))],
        env={**os.environ, "PYTHONPATH": str(Path(sae_training.__file__).parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        # Between taking the folder and its first status a process fills its buffer, which can take minutes; status.json
        # then names the process before it.
        for said in ("held\n", "status\n"):
            assert holder.stdout.readline() == said
            before = {file: file.read_bytes() for file in path.iterdir()}
            with pytest.raises(InUse) as caught:
                RunFolder(path, small_config(wandb_log_frequency=1))
            assert f"process {holder.pid} on {socket.gethostname()} is training" in str(caught.value)
            assert {file: file.read_bytes() for file in path.iterdir()} == before
            if said == "held\n":
                holder.stdin.write("\n")
                holder.stdin.flush()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        RunFolder(path, small_config()).release()
    finally:
        holder.kill()
        holder.communicate()


def test_without_locks_a_run_goes_on_with_a_warning(
    small_config: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no locks .No locks available.*start one at a time"):
        RunFolder(tmp_path / "run", small_config()).release()
