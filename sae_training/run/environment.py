"""What a run began with beside its config, in environment.json: what it read, and what its roundings depend on.

The file is written once. A run that goes on computes with as many threads as it began with, because the order of sums,
and so their last bits, depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_training.activations_store import ActivationsStore
from sae_training.language_model.load import fingerprint
from sae_training.machine.files import write_text
from sae_training.machine.run_files import ENVIRONMENT_FILE, read_if_sound
from sae_training.parallel.agreement import PACKAGE, code
from sae_training.parallel.ranks import n_ranks, of_first


def write_environment(folder: Path, reads: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write environment.json into the folder of a run, unless it is there. `reads`: fingerprints of model and text."""
    path = folder / ENVIRONMENT_FILE
    if not path.is_file():
        write_text(path, json.dumps(environment() | {"reads": dict(reads)}, indent=2) + "\n", last=True)


def environment() -> dict[str, Any]:
    return {
        "processes": n_ranks(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "code": {"hash": code(), **commit()},
    }


def reads_of(store: ActivationsStore, held_out: Tensor) -> dict[str, Any]:
    """Return fingerprints of what a run reads: the language model, the text, what is held out of it, and a cache.

    Of a stream of text, which has no end to be asked for, only what is held out is known.
    """
    text = store.text.documents.start()
    cached = getattr(store.source, "shards", None)
    return {
        "model_name": fingerprint(store.model),
        "dataset_path": None if text["content"] is None else f"{text['content']}, {text['n_rows']} rows",
        "held-out text": hashlib.sha256(held_out.cpu().numpy().tobytes()).hexdigest()[:16],
        "cached_activations_path": None if cached is None else cached.fingerprint(),
    }


def check_reads(expected: Mapping[str, Any], found: Mapping[str, Any], cfg: Any) -> None:
    """Raise ValueError unless a run of `cfg` reads what another has read, as far as that is known of both."""
    others = [
        f"{name}: {getattr(cfg, name, 'what is there')} has the fingerprint {found[name]}, expected {value}, as the "
        "run has read it"
        for name, value in expected.items()
        if value is not None and found.get(name) is not None and value != found[name]
    ]
    if others:
        raise ValueError("\n".join([*others, "Give the same text and model; nothing was trained."]))


def commit() -> dict[str, Any]:
    """Return the git commit of this package, and whether it was changed since; nothing where it is in no checkout."""
    git = ["git", "-C", str(PACKAGE.parent)]
    asked = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", PACKAGE.name])
    try:
        answers = [subprocess.run([*git, *words], capture_output=True, text=True, timeout=30) for words in asked]
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if any(answer.returncode for answer in answers) or not is_tracked(git):
        return {}
    return {"commit": answers[0].stdout.strip(), "is_changed": bool(answers[1].stdout.strip())}


def is_tracked(git: list[str]) -> bool:
    """Return whether the checkout holds this package: a site-packages may lie in one of something else."""
    words = [*git, "ls-files", "--error-unmatch", f"{PACKAGE.name}/__init__.py"]
    return subprocess.run(words, capture_output=True, timeout=30).returncode == 0


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_environment(folder: Path) -> dict[str, Any]:
    """Return what environment.json says; nothing where an earlier version has begun the run, or the file is damaged."""
    return read_if_sound(folder / ENVIRONMENT_FILE)


@contextlib.contextmanager
def threads_of(folder: Path) -> Iterator[None]:
    """Compute in here with as many threads as the run in `folder` began with, if there is one.

    A run that goes on in another number of processes sums in another order anyway, and keeps the threads of now.
    """
    began = of_first(lambda: read_environment(folder))
    threads, here = began.get("threads"), torch.get_num_threads()
    if began.get("processes") != n_ranks() or not isinstance(threads, int) or threads < 1 or threads == here:
        yield
        return
    tqdm.write(f"Threads: {threads}, as the run began with (roundings depend on it), not {here} as here.")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(here)
