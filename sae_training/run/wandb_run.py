"""A run in wandb: opened, fed, ended. This is the only file that imports wandb, and only when a run wants it.

Any call here may fail, or take as long as wandb likes.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import re
import secrets
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from sae_training.formats.native import CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE
from sae_training.machine.run_files import FINAL

WANDB_RUN_ID_FILE = "wandb_run_id.txt"

LONGEST_ARTIFACT_NAME = 128  # because wandb refuses longer ones
SPARSITY = "log_feature_sparsity"

MOST_METADATA_KEYS = 100  # likewise, counted at the top level only

Notify = Callable[[str], None]


@dataclass(frozen=True)
class WandbOptions:
    """How a run appears in wandb, and how long it may be waited for.

    `mode` is "online", "offline" or "disabled"; None takes WANDB_MODE and, without that, online if wandb finds an API
    key, else offline. Runs of one `group` are open at the same time.
    """

    mode: str | None = None
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    init_timeout_s: float = 30.0
    finish_timeout_s: float = 60.0

    @classmethod
    def of_member(cls, cfg: Any, run: Path, member: Path) -> WandbOptions:
        """Return those of the autoencoder in the folder `member` of the run: in a group, if it is one of several."""
        if member == run:
            return cls(cfg.wandb_mode, cfg.wandb_project, cfg.wandb_entity, run.name)
        return cls(cfg.wandb_mode, cfg.wandb_project, cfg.wandb_entity, f"{run.name}/{member.name}", group=run.name)

    @property
    def wanted_mode(self) -> str | None:
        return self.mode or os.environ.get("WANDB_MODE") or None


@dataclass(frozen=True)
class Artifact:
    """Files that wandb keeps together under a name."""

    name: str
    type: str
    paths: Sequence[Path]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    aliases: Sequence[str] = ()


@dataclass
class WandbRun:
    """An open wandb run, and what it holds already.

    Online the server says which steps it has. Offline the files in the run's folder say it: a step is in one of them.
    """

    run: Any
    is_own: bool
    """Whether it was opened here, and not by the caller."""
    prefix: str = ""
    first_step: int = 0
    steps: frozenset[int] = frozenset()
    artifacts: frozenset[tuple[str, str]] = frozenset()
    """Names and digests of the artifacts in its files, offline."""

    @property
    def is_offline(self) -> bool:
        return bool(self.run.offline)

    def has(self, step: int) -> bool:
        return step < self.first_step or step in self.steps

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Log all that there is of a step. In a caller's run others may add to it."""
        values = {self.prefix + key: as_wandb_has_it(value) for key, value in row.items()}
        self.run.log(values, step=step, commit=True if self.is_own else None)

    def alert(self, title: str, text: str) -> None:
        """Have wandb mail this to those who want that."""
        self.run.alert(title=self.prefix + title, text=text, level="WARN", wait_duration=0)

    def has_artifact(self, given: Artifact) -> bool:
        return (artifact_name(given.name), built_artifact(given).digest) in self.artifacts

    def log_artifact(self, given: Artifact) -> bool:
        """Log the artifact, and return whether it was missing. A server keeps the same content once."""
        if self.artifacts and self.has_artifact(given):
            return False
        self.run.log_artifact(built_artifact(given), aliases=list(given.aliases) or None)
        return True

    def finish(self, exit_code: int) -> None:
        """End the run if it was opened here; TimeoutError if a part of it was not uploaded in time."""
        if self.is_own:
            self.run.finish(exit_code=exit_code)


def built_artifact(given: Artifact) -> Any:
    """Return the artifact as wandb has it, with its digest."""
    import wandb

    metadata = dict(given.metadata)
    shown = metadata if len(metadata) <= MOST_METADATA_KEYS else {"cfg": metadata}
    artifact = wandb.Artifact(artifact_name(given.name), given.type, metadata=shown)
    for path in given.paths:
        # The default policy and cache would each copy the weights into the home directory.
        artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    return artifact


def weights_artifacts(folder: Path, name: str, config: Mapping[str, Any]) -> list[Artifact]:
    """Return the artifacts of a folder of weights (final/, or a snapshot): the weights, and how often latents fire."""
    aliases = ["final_model"] if folder.name == FINAL else []
    return [
        Artifact(name, "model", [folder / WEIGHTS_FILE, folder / CONFIG_FILE], config, aliases),
        Artifact(f"{name}_{SPARSITY}", SPARSITY, [folder / SPARSITY_FILE], aliases=aliases),
    ]


def words_of(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Return what an evaluation.json says in words, which wandb shows with its figures, or in place of them."""
    remarks = evaluation.get("remarks")
    words = {key: value for key, value in evaluation.items() if isinstance(value, str)}
    return words | ({"remarks": "; ".join(remarks)} if remarks else {})


def as_wandb_has_it(value: Any) -> Any:
    """Return a value of metrics.jsonl as wandb shows it: null is NaN, counts and edges are a histogram."""
    import wandb

    if isinstance(value, dict):
        return wandb.Histogram(np_histogram=(np.array(value["counts"]), np.array(value["edges"])))
    return math.nan if value is None else value


def callers_run() -> Any:
    """Return the wandb run that is open in this process, as in the function of a sweep; None if there is none."""
    import wandb

    return wandb.run


def join(run: Any, folder: Path, options: WandbOptions, config: dict[str, Any]) -> WandbRun:
    """Use the run that the caller has opened; autoencoders of a group have the names of their folders before keys.

    Its id and project are kept for `sync`, but not in a group, whose autoencoders `sync` sends to a run each.
    """
    if options.group is not None:
        run.config.update({folder.name: config}, allow_val_change=True)
        return WandbRun(run, is_own=False, prefix=f"{folder.name}/", first_step=run.starting_step)
    run.config.update(config, allow_val_change=True)
    keep_run_id(folder, run.id, where(run))
    return WandbRun(run, is_own=False, first_step=run.starting_step)


def open_run(folder: Path, options: WandbOptions, config: dict[str, Any], online: bool, again: bool) -> WandbRun:
    """Open the wandb run of the run in `folder`, `again` if this process has done so before."""
    import wandb

    folder = folder.resolve()  # because wandb takes a relative path as relative to wherever it starts
    in_sweep = "WANDB_SWEEP_ID" in os.environ  # then the agent has settled project, entity and id
    entity, project = place_of(folder, options)
    arguments: dict[str, Any] = {
        "dir": str(folder),
        "config": config,
        "name": options.name,
        "project": None if in_sweep else project,
        "entity": None if in_sweep else entity,
        "id": None if in_sweep and options.group is None else run_id(folder, is_only_one=options.group is None),
        "settings": quiet_settings(options),
    }
    if options.group is not None:  # the runs of the others stay open
        arguments |= {"group": options.group, "reinit": "create_new"}
    if online:
        shared: Any = "shared" if options.wanted_mode == "shared" else "online"
        run = wandb.init(mode=shared, resume=None if in_sweep and not again else "allow", **arguments)
    else:
        run = wandb.init(mode="offline", **arguments)
    keep_run_id(folder, run.id, where(run) if in_sweep else "")
    if online:
        return WandbRun(run, is_own=True, first_step=run.starting_step)
    steps, artifacts = in_files(folder, run.id)
    return WandbRun(run, is_own=True, steps=steps, artifacts=artifacts)


def quiet_settings(options: WandbOptions) -> Any:
    """Return settings under which wandb leaves console, code and git alone and waits a bounded time."""
    import wandb

    wanted = {
        "console": "off",
        "silent": True,
        "quiet": True,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "init_timeout": options.init_timeout_s,
        "finish_timeout": options.finish_timeout_s,
        "finish_timeout_raises": True,
    }
    known = wandb.Settings.model_fields  # because older releases lack the finish timeout
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def has_api_key() -> bool:
    """Return whether wandb can log in without asking: by environment, earlier login or netrc file."""
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or os.environ.get("WANDB_API_KEY") or getattr(settings, "identity_token_file", None):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def end_service(at_once: bool = False) -> None:
    """End wandb's service process, with all runs that it has open; `at_once` if it may have stopped answering."""
    import wandb

    if at_once:  # because `teardown` would wait for it, as wandb's own exit hook would
        with suppress(Exception):  # which may be an attribute that another release of wandb lacks
            process = wandb.setup().assert_service()._proc._process  # pyright: ignore
            process.terminate()  # of which it writes its files to the end, unless it stands still
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
            process.kill()
            process.wait(2.0)
    with suppress(Exception, SystemExit):  # which wandb raises after a service that was killed
        wandb.teardown()
    wandb.run = None


def run_id(folder: Path, is_only_one: bool) -> str:
    """Return the one id that the run folder has for life: a resumed run continues the same wandb run."""
    if is_only_one and (given := os.environ.get("WANDB_RUN_ID")):
        return given
    if kept := kept_lines(folder):
        return kept[0]
    new_id = secrets.token_hex(4)  # not from `random`, whose state belongs to the user
    keep_run_id(folder, new_id)
    return new_id


def where(run: Any) -> str:
    return f"{run.entity or ''}/{run.project or ''}"


def keep_run_id(folder: Path, new_id: str, place: str = "") -> None:
    """Keep the id if there is none, and `place`, entity/project, where the config does not say it."""
    kept = kept_lines(folder)
    if not kept or (place and kept == [new_id]):
        (folder / WANDB_RUN_ID_FILE).write_text(f"{new_id}\n{place}".rstrip() + "\n")


def kept_lines(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return (folder / WANDB_RUN_ID_FILE).read_text().strip().splitlines()
    return []


def place_of(folder: Path, options: WandbOptions) -> tuple[str | None, str | None]:
    """Return the entity and the project of the run: where a sweep or a caller began it, else what the options say."""
    kept = kept_lines(folder)
    if len(kept) < 2:
        return options.entity, options.project
    entity, _, project = kept[1].partition("/")
    return entity or None, project or options.project


def artifact_name(name: str) -> str:
    """Return the name without what wandb forbids; a long one keeps its end, where runs differ."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-LONGEST_ARTIFACT_NAME:]


def described(error: Exception) -> str:
    """Return the kind of the error and the first line of its message: wandb's messages run to pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------- what its files hold


def in_files(folder: Path, run_id: str) -> tuple[frozenset[int], frozenset[tuple[str, str]]]:
    """Return the steps, and the names and digests of the artifacts, that wandb's files in a run folder hold."""
    steps, artifacts = set[int](), set[tuple[str, str]]()
    for file in sorted(folder.glob(f"wandb/*run-*/run-{run_id}.wandb")):
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                steps |= {json.loads(i.value_json) for i in record.history.item if "_step" in (i.key, *i.nested_key)}
            elif kind == "artifact":
                artifacts.add((record.artifact.name, record.artifact.digest))
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                logged = record.request.log_artifact.artifact
                artifacts.add((logged.name, logged.digest))
    return frozenset(steps), frozenset(artifacts)


BLOCK, HEADER = 32_768, 7  # bytes: a .wandb file is a log of LevelDB


def records(file: Path) -> Iterator[Any]:
    """Yield the records that are whole: wandb writes a block at a time, so a kill leaves a part of the last one."""
    from wandb.proto import wandb_internal_pb2

    record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]
    data, parts = file.read_bytes(), b""
    place = HEADER  # the file's own header
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # no header fits into the rest of this block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + HEADER : place + HEADER + length]
        if kind == 0 or len(part) < length:  # nothing was written from here on
            return
        parts += part
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            with contextlib.suppress(ValueError):  # of a record that a full disk has damaged
                yield record.FromString(parts)
            parts = b""
