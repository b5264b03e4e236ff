"""A run's folder: which one a command begins or continues, which process holds it, and how far the run is.

What is in it: `machine.run_files`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.config.io import WATCHING_FIELDS, config_differences, config_from_dict, config_to_dict
from sae_training.config.sweep import is_several
from sae_training.machine.files import NotEnoughDisk, write_text
from sae_training.machine.holder import read_holder
from sae_training.machine.lock import LETS_GO_WITHIN, InUse, exclusive
from sae_training.machine.log import keep_in
from sae_training.machine.paths import PATH_FIELDS, command, paths_of, same_or_moved
from sae_training.machine.run_files import CHECKPOINTS, FINAL, LOCK_FILE, METRICS_FILE, RUN_CONFIG_FILE, STATUS_FILE
from sae_training.parallel.ranks import check_all_see, is_first, wait_for_all
from sae_training.run.environment import write_environment
from sae_training.run.record import Kind, Record

PACKAGES = ("sae-training", "torch", "transformer-lens", "transformers", "datasets")


class RunFolder:
    """A run folder that this process holds, or the first of those that train in it together.

    The lock is the operating system's: it ends with the process. `reads` are fingerprints of what the run reads.
    """

    def __init__(self, path: Path, cfg: Any, kind: Kind = "train", reads: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.record = Record(path, kind)
        self.is_new = is_first() and not path.exists()
        self.made_parent = not path.parent.exists()
        self.lock: FileLock | None = None
        try:
            if is_first():
                self.hold(cfg, reads or {})
            wait_for_all()
            check_all_see(path, "run_dir")
            keep_in(path)
        except BaseException:  # because nobody has the folder, and can release it
            self.release()
            raise

    def hold(self, cfg: Any, reads: Mapping[str, Any]) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_of(path)
            self.record.begin()
        except (InUse, NotEnoughDisk):
            raise
        except OSError as error:
            raise type(error)(
                f"run_dir: cannot write to {path} ({error.strerror}); set run_dir to a folder you may write to."
            ) from error
        write_config(path, cfg)
        if not has_begun(path):  # which an earlier version may have done, in an environment that this one does not know
            write_environment(path, reads)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def final(self) -> Path:
        return self.path / FINAL

    def write_status(self, state: str, **figures: Any) -> None:
        """Rewrite status.json, whole or not at all. `state`: training, interrupted, failed or finished."""
        self.record.write(state, **figures)

    def release(self) -> None:
        self.record.end()
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def discard_if_new(self) -> None:
        """Remove the folder if this process made it: a run that could not start leaves nothing to be resumed."""
        if self.is_new:
            shutil.rmtree(self.path)
            if self.made_parent:
                self.path.parent.rmdir()


# ------------------------------------------------------------------------------------------------------ which folder


def choose_run_folder(cfg: LanguageModelSAERunnerConfig) -> Path:
    """Return the folder in which this config trains, without touching any.

    resume="auto" continues the unfinished run of the config's name, or begins in the first free folder of <name>,
    <name>-2, <name>-3, ...; "never" always begins anew. Raises ValueError, saying where they differ, if the unfinished
    run has another config, and FileNotFoundError with resume="must" if there is no unfinished run.
    """
    base = Path(cfg.resolved_run_dir) / cfg.resolved_run_name.replace("/", "_")
    existing = list(existing_folders(base))
    unfinished = [folder for folder in existing if not is_finished(folder)]
    if cfg.resume != "never" and unfinished:
        folder = unfinished[-1]
        check_same_config(folder, cfg)
        return folder
    if cfg.resume == "must":
        found = f"finished runs: {', '.join(p.name for p in existing)}" if existing else "no folder of that name"
        raise FileNotFoundError(f'resume: "must", but {base.parent} has no unfinished run {base.name!r} ({found}).')
    return free_folder(base)


def free_folder(base: Path) -> Path:
    """Return `base`, or the first of <name>-2, <name>-3, ... that holds no run."""
    existing = list(existing_folders(base))
    return base if not existing else base.with_name(f"{base.name}-{len(existing) + 1}")


def existing_folders(base: Path) -> Iterator[Path]:
    folder, number = base, 1
    while (folder / RUN_CONFIG_FILE).is_file():
        yield folder
        number += 1
        folder = base.with_name(f"{base.name}-{number}")


def has_begun(folder: Path) -> bool:
    """Return whether the run has a checkpoint or logged rows, or one of its autoencoders has."""
    logs = (folder / METRICS_FILE, *folder.glob(f"*/{METRICS_FILE}"))
    return any((folder / CHECKPOINTS).glob("*")) or any(log.is_file() and log.stat().st_size > 0 for log in logs)


def is_finished(folder: Path) -> bool:
    return (folder / FINAL).is_dir()


def is_member_folder(path: Path) -> bool:
    """Return whether the folder is that of one autoencoder in a run of several, whose folder is the one above."""
    parent = path.resolve().parent
    files = (parent / RUN_CONFIG_FILE, parent / STATUS_FILE)  # both, because users have files named config.json, too
    return all(file.is_file() for file in files) and is_several(read_run_config(parent))


def check_same_config(folder: Path, cfg: LanguageModelSAERunnerConfig) -> None:
    """Raise ValueError if the run in `folder` was started with other values of fields that change the weights.

    A path that is gone and now lies elsewhere under the same name is no other value: a run may go on on another
    machine. What is in it is checked where it is read: models and texts have fingerprints in a checkpoint.
    """
    differences = config_differences(read_run_config(folder), cfg, ignore=WATCHING_FIELDS)
    moved = {name: pair for name, pair in differences.items() if name in PATH_FIELDS and same_or_moved(*pair)}
    others = {name: pair for name, pair in differences.items() if name not in moved}
    if others:
        lines = [f"  {name}: {old!r} -> {new!r}" for name, (old, new) in others.items()]
        raise ValueError(
            f"{folder} holds an unfinished run with another config:\n"
            + "\n".join(lines)
            + '\nGive the old values to continue it, or another run_name, or resume="never", to begin a new run.'
        )
    for name, (old, new) in moved.items():
        tqdm.write(f"{name}: {old} is not here; this run goes on with {new}.")


def check_paths(folder: Path, cfg: LanguageModelSAERunnerConfig) -> None:
    """Raise FileNotFoundError if what the run in `folder` reads is not on this machine."""
    for name, paths in paths_of(cfg).items():
        for path in paths:
            if not path.exists() and name != "from_pretrained_path":  # read at the start of a run only
                raise FileNotFoundError(
                    f"{name}: {path}, which {folder} was started with, is not here. If it lies elsewhere now: "
                    f"{command('resume', folder, f'--{name}', 'NEW')}"
                )


# ---------------------------------------------------------------------------------------------------- what is in it


def write_config(folder: Path, cfg: Any) -> None:
    """Write config.json into `folder`, which is made if it is not there; its versions are those a run began with."""
    folder.mkdir(exist_ok=True)
    versions = installed_versions()
    with suppress(OSError, ValueError, KeyError, TypeError):
        versions = json.loads((folder / RUN_CONFIG_FILE).read_text(encoding="utf-8"))["versions"]
    content = {"config": config_to_dict(cfg), "versions": versions}
    write_text(folder / RUN_CONFIG_FILE, json.dumps(content, indent=2) + "\n", last=True)


def is_run_folder(path: Path) -> bool:
    """Whether the folder is that of a run: its config.json is what `write_config` writes. Others' files have that name.

    A run whose config.json is damaged counts as one, so that `read_run_config` says what is wrong with it.
    """
    file = path / RUN_CONFIG_FILE
    if not file.is_file():
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return (path / STATUS_FILE).is_file()
    return isinstance(values, dict) and {"config", "versions"} <= values.keys()


def read_run_config(folder: Path) -> LanguageModelSAERunnerConfig:
    path = folder / RUN_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a run folder, it has no {RUN_CONFIG_FILE}; expected runs/<run name>.")
    kind = None
    with suppress(OSError, ValueError, AttributeError):
        kind = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8")).get("kind")
    if kind == "toy":
        raise ValueError(
            f"{folder}: is a toy run, expected one on a language model; `sae-training toy` with its flags trains it "
            "once more."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:  # models in Hugging Face's layout have a config.json too
        raise ValueError(f"{path}: not the config of a run; expected a run folder, runs/<run name>.") from error
    return config_from_dict(values)


def lock_of(folder: Path) -> FileLock:
    """Take the lock of a run's folder. A killed process is waited for, which may hold it for a moment yet."""
    deadline = time.monotonic() + LETS_GO_WITHIN
    while True:
        try:
            return exclusive(folder / LOCK_FILE, lambda: in_use(folder))
        except InUse:
            holder = read_holder(folder)
            if holder is None or holder.life() != "dead" or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def in_use(folder: Path) -> str:
    """Say which process is training in the folder, and what to do."""
    holder = read_holder(folder)
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
    return (
        f"{folder}: {who} is training in this folder. Wait for it, or give this run another run_name, or "
        'resume="never" for a new folder.'
    )


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that a run's figures depend on."""
    return {name: installed_version(name) for name in PACKAGES}


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
