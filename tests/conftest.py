"""Shared parts: the bundled language model, and small configs on it. No test reaches the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402 - the variables above are read at import
from small import SMALL_RUN  # noqa: E402

from sae_training.config import LanguageModelSAERunnerConfig  # noqa: E402
from sae_training.language_model.load import load_language_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the parts are small: more threads would only wait for each other


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """The bundled language model, in float32."""
    return load_language_model("demo", lm_dtype="float32")


@pytest.fixture
def tmux(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tmux server of the test's own. Its socket's path must be short, so it is not in tmp_path."""
    with tempfile.TemporaryDirectory(prefix="tmux-", dir="/tmp") as folder:
        monkeypatch.setenv("TMUX_TMPDIR", folder)
        monkeypatch.delenv("TMUX", raising=False)
        yield
        if shutil.which("tmux"):
            subprocess.run(["tmux", "kill-server"], stderr=subprocess.DEVNULL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts an empty disk of so many MiB, at most one; keywords are options of tmpfs."""
    disk = tmp_path / "disk"
    mounted = False

    def mount(megabytes: int, **options: int) -> Path:
        nonlocal mounted
        disk.mkdir()
        words = ",".join([f"size={megabytes}m", *(f"{name}={value}" for name, value in options.items())])
        command = ["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
        mounted = True
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., LanguageModelSAERunnerConfig]:
    """A config of a run of about a second, in the test's own folder; keywords change fields."""

    def make(**changes: Any) -> LanguageModelSAERunnerConfig:
        return LanguageModelSAERunnerConfig(**{**SMALL_RUN, "run_dir": str(tmp_path / "runs"), **changes})

    return make


@pytest.fixture
def clean_wandb(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings, key or files of the user's own; a fresh wandb session."""
    import wandb

    wandb.teardown()  # first: the address of the service that it ends is among the variables, which come back later
    home = tmp_path_factory.mktemp("wandb_home")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    yield
    wandb.teardown()
