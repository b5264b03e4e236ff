"""Send to wandb, later, what it lacks of a run: the rows of metrics.jsonl with their histograms, and saved weights."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_training.config.io import config_to_dict
from sae_training.machine.files import step_number
from sae_training.machine.lock import exclusive
from sae_training.machine.run_files import EVALUATION_FILE, FINAL, METRICS_FILE, SNAPSHOTS
from sae_training.run import wandb_run
from sae_training.run.folder import LOCK_FILE, is_finished, is_member_folder, read_run_config
from sae_training.run.wandb_mirror import Steps
from sae_training.run.wandb_run import Artifact, WandbOptions, WandbRun
from sae_training.sparse_autoencoder.name import name_of


def sync(path: Path, offline: bool = False) -> Iterator[str]:
    """Send what wandb lacks of the run in `path`, and yield a line for each of its autoencoders.

    What is there is not sent again: online a server says which steps it has, offline the files in the run's folder do.
    """
    read_run_config(path)
    if is_member_folder(path):
        raise ValueError(f"{path}: is one of several that are trained together; sync {path.parent}.")
    offline = offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    if not offline and not wandb_run.has_api_key():
        raise ValueError(
            "sync: found no API key of wandb; run `wandb login` or set WANDB_API_KEY. Without one, --offline writes "
            "files into the run's folder, which `wandb sync` uploads from a machine that has one."
        )
    lock = exclusive(
        path / LOCK_FILE, lambda: f"{path}: a process trains in this folder, and sends its rows itself; wait for it."
    )
    try:
        for folder in [path] if (path / METRICS_FILE).exists() else members(path):
            yield f"{folder}: {sync_one(path, folder, offline)}"
    except BaseException:
        wandb_run.end_service(at_once=True)  # because wandb would send on, for as long as that takes
        raise
    finally:
        lock.release()


def members(path: Path) -> list[Path]:
    found = sorted(file.parent for file in path.glob(f"*/{METRICS_FILE}"))
    if not found:
        raise FileNotFoundError(f"{path}: found no {METRICS_FILE}, in it or in its folders; nothing was logged yet.")
    return found


def sync_one(path: Path, folder: Path, offline: bool) -> str:
    """Send what is missing of the autoencoder in `folder`, and say in words what was."""
    cfg = read_run_config(folder)
    options = dataclasses.replace(
        WandbOptions.of_member(cfg, path, folder), finish_timeout_s=0.0
    )  # as long as it takes
    steps, artifacts = dict(rows(path, folder)), saved_weights(folder, cfg)
    arguments = (folder, options, config_to_dict(cfg), not offline, True)
    if offline:
        run_id = wandb_run.run_id(folder, is_only_one=options.group is None)
        in_files = WandbRun(None, True, "", 0, *wandb_run.in_files(folder, run_id))
        if not lacking(in_files, steps) and all(in_files.has_artifact(artifact) for artifact in artifacts):
            return f"wandb's files hold all {len(steps)} steps and {len(artifacts)} artifacts; nothing was written"
    run = wandb_run.open_run(*arguments)
    missing = lacking(run, steps)
    for step in missing:
        run.log(step, steps[step])
    n_artifacts = sum(run.log_artifact(artifact) for artifact in artifacts)
    run_id, where = run.run.id, "" if offline else run.run.url
    run.finish(0)
    said = f"{len(missing)} steps sent, {len(steps) - len(missing)} were there; {n_artifacts} artifacts sent"
    if offline:
        files = shlex.quote(str(folder / "wandb")) + f"/offline-run-*-{run_id}"
        return f"{said}, as files for `wandb sync {files}`"
    again = wandb_run.open_run(*arguments)  # because wandb ends in peace after a server has refused all that was sent
    again.finish(0)
    if left := lacking(again, steps):
        raise ConnectionError(
            f"{folder}: {said}, but {where} lacks {len(left)}, from step {left[0]} on: the server has refused them, or "
            "is behind. The same command sends what is missing."
        )
    return f"{said}, the same content of which a server keeps once: {where}"


def lacking(run: WandbRun, steps: dict[int, dict[str, Any]]) -> list[int]:
    return [step for step in steps if not run.has(step)]


def rows(path: Path, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each step of the autoencoder with all that wandb shows of it.

    The last step of a run that is not finished is left out, because the run that goes on may add to it.
    """
    complete = is_finished(path)
    found = list(Steps(folder / METRICS_FILE).new(is_complete=complete))
    evaluation = folder / FINAL / EVALUATION_FILE
    for number, (step, row) in enumerate(found, 1):
        is_last = number == len(found) and evaluation.is_file()
        yield step, row | wandb_run.words_of(json.loads(evaluation.read_text(encoding="utf-8"))) if is_last else row


def saved_weights(folder: Path, cfg: Any) -> list[Artifact]:
    """Return the artifacts of the autoencoder's snapshots, in order, and of its final weights."""
    snapshots = sorted((folder / SNAPSHOTS).glob("step_*"), key=step_number)
    found = [place for place in (*snapshots, folder / FINAL) if place.is_dir()]
    name = name_of(cfg, cfg.d_sae)
    return [artifact for place in found for artifact in wandb_run.weights_artifacts(place, name, config_to_dict(cfg))]
