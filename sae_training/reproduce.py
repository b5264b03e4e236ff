"""The verb `reproduce`: train a run once more from what its folder says of it, and compare the two bit by bit."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_training.formats.native import SPARSITY_FILE, WEIGHTS_FILE
from sae_training.lm_runner import run_config
from sae_training.machine.paths import command
from sae_training.machine.phases import is_speaker
from sae_training.machine.run_files import FINAL, METRICS_FILE, RUN_CONFIG_FILE
from sae_training.report.metrics_file import read_metrics
from sae_training.run.environment import environment, read_environment
from sae_training.run.folder import (
    check_paths,
    installed_versions,
    is_finished,
    is_member_folder,
    read_run_config,
)

MOST_FIGURES = 8  # of a row, that are shown where two runs part


class NotReproduced(ArithmeticError):
    """The run that was trained once more is another."""


def reproduce(path: Path, run_name: str | None = None) -> Path:
    """Train the run in `path` once more, beside it, and return the new folder; NotReproduced, if a bit differs.

    The new run has the config of the old one, without wandb, and as many threads as that began with; if it is stopped,
    the same command goes on with it. Of a run that is not finished, the rows that it has logged are compared.
    """
    if is_member_folder(path):
        raise ValueError(f"{path}: is one of several that are trained together; reproduce {path.parent}.")
    cfg = read_run_config(path)
    check_paths(path, cfg)
    began = read_environment(path)
    check_processes(path, began.get("processes", 1))
    name = run_name or f"{path.resolve().name}-again"
    if name == path.resolve().name:
        raise ValueError(f"run_name: found {name!r}, the run's own; give the new run another.")
    cfg = dataclasses.replace(cfg, run_dir=str(path.resolve().parent), run_name=name, resume="auto", log_to_wandb=False)
    if began.get("threads"):
        torch.set_num_threads(began["threads"])
    before = list(differences(path, began))
    tell("\n".join([f"Trains {path} once more, as {name}.", *(f"  Not as then: {one}." for one in before)]))
    again = run_config(cfg, reads=began.get("reads", {})).folder.path
    if found := list(compared(path, again)):
        why = before or ["something that is not recorded; threads, processor, versions and code are the same"]
        reasons = (f"Perhaps because: {one}" for one in why)
        raise NotReproduced("\n  ".join([f"{again} is not {path}:", *found, *reasons]))
    what = "weights and rows" if is_finished(path) else "all rows that it has logged (it is not finished)"
    tell(f"Same bits: {what} of {path} and {again}.")
    return again


def check_processes(path: Path, n: int) -> None:
    here = int(os.environ.get("WORLD_SIZE", "1"))
    if n != here:
        words = command("reproduce", path).removeprefix("python ")
        alone = f"python {words}" if n == 1 else f"torchrun --nproc_per_node {n} {words}"
        raise ValueError(f"{path}: was trained by {n} processes, this job has {here}; start it with {alone}")


def differences(path: Path, began: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not as it was when the run in `path` began, as far as its folder says it."""
    here = environment()
    for name in ("processor", "instructions", "gpu", "threads", "python", "platform"):
        if name in began and began[name] != here[name]:
            yield f"{name} {here[name]}, then {began[name]}"
    then, now = began.get("code", {}), here["code"]
    if then.get("hash") not in (None, now["hash"]):
        yield f"the package's code {in_words(now)}, then {in_words(then)}"
    versions = json.loads((path / RUN_CONFIG_FILE).read_text(encoding="utf-8"))["versions"]
    for name, version in installed_versions().items():
        if versions.get(name, version) != version:
            yield f"{name} {version}, then {versions[name]}"


def in_words(code: Mapping[str, Any]) -> str:
    commit = f" (commit {code['commit'][:12]}{', changed since' * code['is_changed']})" if "commit" in code else ""
    return f"{code['hash']}{commit}"


def compared(path: Path, again: Path) -> Iterator[str]:
    """Yield what differs between two runs: the first step at which rows do, and weights, of each autoencoder."""
    folders = (
        [""] if (again / METRICS_FILE).exists() else sorted(f.parent.name for f in again.glob(f"*/{METRICS_FILE}"))
    )
    for name in folders:
        shown = f"{name}: " if name else ""
        for one in (*rows(path / name, again / name, is_finished(path)), *weights(path / name, again / name)):
            yield f"{shown}{one}"


def rows(path: Path, again: Path, is_whole: bool) -> Iterator[str]:
    """Yield where the rows of two runs part: the step, and the figures that differ in it."""
    old, new = read_metrics(path), read_metrics(again)
    for number, (then, now) in enumerate(zip(old, new, strict=False), 1):
        names = [name for name in dict.fromkeys((*then, *now)) if then.get(name) != now.get(name)]
        if names:
            shown = [f"{name} {brief(now.get(name))}, not {brief(then.get(name))}" for name in names[:MOST_FIGURES]]
            more = [f"and {len(names) - MOST_FIGURES} more"] if len(names) > MOST_FIGURES else []
            yield f"rows differ from row {number} on, step {then['step']}: {'; '.join(shown + more)}"
            return
    if len(old) > len(new) or is_whole and len(old) < len(new):
        yield f"{len(new)} rows, not {len(old)}"


def brief(value: Any) -> str:
    return "a histogram" if isinstance(value, dict) else str(value)


def weights(path: Path, again: Path) -> Iterator[str]:
    """Yield which tensors of final/ differ, in how many places, and by how much."""
    for file in (WEIGHTS_FILE, SPARSITY_FILE):
        if not (path / FINAL / file).is_file():  # it is not finished
            continue
        old, new = load_file(path / FINAL / file), load_file(again / FINAL / file)
        for name in dict.fromkeys((*old, *new)):
            if name not in old or name not in new or old[name].shape != new[name].shape:
                yield f"{FINAL}/{file}: {name} {shape(new.get(name))}, not {shape(old.get(name))}"
            elif n := int((bits(old[name]) != bits(new[name])).sum()):
                most = f"{(old[name].double() - new[name].double()).abs().max():.2g}"
                yield f"{FINAL}/{file}: {name} differs in {n:,} of {old[name].numel():,} values, by {most} at most"


def shape(tensor: Tensor | None) -> str:
    return "is not there" if tensor is None else f"of {tuple(tensor.shape)}"


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as integers: equal NaNs are equal, and 0 is not -0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def tell(text: str) -> None:
    if is_speaker():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
