"""TODO."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from sae_training.report.metrics_file import METRICS_FILE

WANDB_RUN_ID_FILE = "wandb_run_id.txt"

_LONGEST_ARTIFACT_NAME = 128  # wandb refuses longer ones

_MOST_METADATA_KEYS = 100  # likewise, counted at the top level only

Notify = Callable[[str], None]


class _WandbMirror:
    """A wandb run that can fail at any point: the first failure is told and switches it off."""

    def __init__(self, folder: Path, notify: Notify) -> None:
        self._folder = folder.resolve()  # wandb takes a relative path as relative to wherever it starts
        self._notify = notify
        self._wandb: ModuleType | None = None
        self._run: Any = None
        self._owns_run = False
        self._prefix = ""

    @property
    def url(self) -> str | None:
        if self._run is None or self._run.offline:
            return None
        return self._run.url

    @property
    def is_offline(self) -> bool:
        return self._run is not None and self._run.offline

    def start(self, mode: str | None, *, config: dict[str, Any], group: str | None, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            self._notify(f"wandb: cannot be imported ({error}); metrics go to {METRICS_FILE} alone")
            return
        self._wandb = wandb
        try:
            if wandb.run is not None:
                self._run = wandb.run
                self._prefix = "" if group is None else f"{self._folder.name}/"
                own = config if group is None else {self._folder.name: config}
                self._run.config.update(own, allow_val_change=True)
            else:
                self._owns_run = True
                self._run = self._open(wandb, mode, config, group=group, **options)
                _open_mirrors.add(self)
        except Exception as error:
            self._switch_off("could not be started", error)

    def _open(
        self,
        wandb: ModuleType,
        mode: str | None,
        config: dict[str, Any],
        *,
        project: str | None,
        entity: str | None,
        group: str | None,
        name: str | None,
        init_timeout_s: float,
        finish_timeout_s: float,
    ) -> Any:
        online = mode not in ("offline", "dryrun")
        if online and not _has_api_key(wandb):
            # Going on would make wandb ask for a key at the terminal and wait for the answer.
            self._notify(f"wandb: no API key found, so this run is kept offline; {self._how_to_sync()}")
            online = False
        in_sweep = "WANDB_SWEEP_ID" in os.environ  # the agent has then settled project, entity and id
        arguments: dict[str, Any] = {
            "dir": str(self._folder),
            "config": config,
            "name": name,
            "project": None if in_sweep else project,
            "entity": None if in_sweep else entity,
            "id": None if in_sweep and group is None else self._run_id(is_only_one=group is None),
            "settings": _quiet_settings(wandb, init_timeout_s, finish_timeout_s),
        }
        if group is not None:  # the others of the group go on
            arguments |= {"group": group, "reinit": "create_new"}
        run = None
        if online:
            try:
                run = wandb.init(mode=mode or "online", resume=None if in_sweep else "allow", **arguments)
            except Exception as error:
                self._notify(
                    f"wandb: no connection ({_first_line(error)}), so this run is kept offline; {self._how_to_sync()}"
                )
                if not _open_mirrors:
                    wandb.teardown()  # or the service goes on holding the run id
        if run is None:
            run = wandb.init(mode="offline", **arguments)
        self._keep_run_id(run.id)
        return run

    def log(self, row: dict[str, Any], step: int) -> None:
        row = {self._prefix + key: value for key, value in row.items()}
        self._attempt("lost its connection", lambda: self._run.log(row, step=step))

    def log_histogram(self, key: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
        def send() -> None:
            assert self._wandb is not None
            histogram = self._wandb.Histogram(np_histogram=(counts, edges))
            self._run.log({self._prefix + key: histogram}, step=step)

        self._attempt("lost its connection", send)

    def log_artifact(
        self,
        name: str,
        artifact_type: str,
        paths: Sequence[Path],
        metadata: dict[str, Any],
        aliases: list[str],
    ) -> None:
        def send() -> None:
            assert self._wandb is not None
            fits = len(metadata) <= _MOST_METADATA_KEYS
            artifact = self._wandb.Artifact(
                _artifact_name(name),
                artifact_type,
                metadata=metadata if fits else {"cfg": metadata},
            )
            for path in paths:
                # The default policy and cache would each copy the weights into the home directory.
                artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=aliases or None)

        if self._run is None:
            return
        try:
            send()
        except Exception as error:
            # A file or a name may be at fault; the metrics can still flow.
            self._notify(f"wandb: artifact {name} was not logged ({_first_line(error)})")

    def finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        _open_mirrors.discard(self)
        if run is None or not self._owns_run:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._notify(f"wandb: not everything was uploaded ({_first_line(error)}); {self._how_to_sync()}")
            self._end_session()

    def _attempt(self, failure: str, action: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._switch_off(failure, error)

    def _switch_off(self, failure: str, error: Exception) -> None:
        self._notify(
            f"wandb: {failure} ({_first_line(error)}); it is off from here on, and metrics go to {METRICS_FILE} alone"
        )
        self._run = None
        if self._owns_run:
            self._end_session()

    def _end_session(self) -> None:
        _open_mirrors.discard(self)
        if self._wandb is not None and not _open_mirrors:  # it would end the runs of the others too
            with suppress(Exception):  # its own exit hook would print a traceback
                self._wandb.teardown()

    def _run_id(self, is_only_one: bool) -> str:
        """One id for the life of the run folder: a resumed run continues the same wandb run."""
        if is_only_one and (given := os.environ.get("WANDB_RUN_ID")):
            return given
        with suppress(FileNotFoundError):
            if kept := (self._folder / WANDB_RUN_ID_FILE).read_text().strip():
                return kept
        run_id = secrets.token_hex(4)  # not from `random`, whose state belongs to the user
        self._keep_run_id(run_id)
        return run_id

    def _keep_run_id(self, run_id: str) -> None:
        path = self._folder / WANDB_RUN_ID_FILE
        if not path.exists() or not path.read_text().strip():
            path.write_text(run_id + "\n")

    def _how_to_sync(self) -> str:
        return f"'wandb sync {self._folder / 'wandb'}/*run-*' uploads it later"


def _quiet_settings(wandb: ModuleType, init_timeout_s: float, finish_timeout_s: float) -> Any:
    """Settings under which wandb leaves console, code and git alone and waits a bounded time."""
    wanted = {
        "console": "off",
        "silent": True,
        "quiet": True,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "init_timeout": init_timeout_s,
        "finish_timeout": finish_timeout_s,
        "finish_timeout_raises": True,
    }
    known = wandb.Settings.model_fields  # older releases lack the finish timeout
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def _has_api_key(wandb: ModuleType) -> bool:
    """Whether wandb can log in without asking: by environment, earlier login or netrc file."""
    settings = wandb.setup().settings
    if settings.api_key or os.environ.get("WANDB_API_KEY") or getattr(settings, "identity_token_file", None):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def _artifact_name(name: str) -> str:
    """The name with what wandb forbids replaced; a long one keeps its end, where runs differ."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-_LONGEST_ARTIFACT_NAME:]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_open_mirrors: set[_WandbMirror] = set()
