"""A mirror of a run's log in wandb. This is the only file that imports wandb, and only when a run wants it."""

from __future__ import annotations

import netrc
import os
import re
import secrets
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from sae_training.machine.run_files import METRICS_FILE

WANDB_RUN_ID_FILE = "wandb_run_id.txt"

LONGEST_ARTIFACT_NAME = 128  # because wandb refuses longer ones
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
    def of(cls, cfg: Any, name: str, group: str | None = None) -> WandbOptions | None:
        """Return the options in a run config, or in one of toy models; None if it does not want wandb."""
        if not cfg.log_to_wandb:
            return None
        return cls(cfg.wandb_mode, cfg.wandb_project, cfg.wandb_entity, name, group)


class WandbMirror:
    """A wandb run that may fail at any point: its user is told of the first failure, which switches the mirror off."""

    def __init__(self, folder: Path, notify: Notify) -> None:
        self._folder = folder.resolve()  # because wandb takes a relative path as relative to wherever it starts
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

    def start(self, options: WandbOptions, config: dict[str, Any], offline: bool = False) -> None:
        """Open the wandb run, or join the one that the caller has opened; a mode of "disabled" opens none."""
        mode = options.mode or os.environ.get("WANDB_MODE") or None
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            self._notify(f"wandb: cannot be imported ({error}); metrics go to {METRICS_FILE} alone")
            return
        self._wandb = wandb
        try:
            if wandb.run is not None:
                self._run = wandb.run
                self._prefix = "" if options.group is None else f"{self._folder.name}/"
                own = config if options.group is None else {self._folder.name: config}
                self._run.config.update(own, allow_val_change=True)
            else:
                self._owns_run = True
                self._run = self._open(wandb, "offline" if offline else mode, options, config)
                open_mirrors.add(self)
        except Exception as error:
            self._switch_off("could not be started", error)

    def _open(self, wandb: ModuleType, mode: str | None, options: WandbOptions, config: dict[str, Any]) -> Any:
        online = mode not in ("offline", "dryrun")
        if online and not has_api_key(wandb):
            # Without this wandb would ask for a key at the terminal, and wait for the answer.
            self._notify(f"wandb: no API key found, so this run is kept offline; {self._how_to_sync()}")
            online = False
        in_sweep = "WANDB_SWEEP_ID" in os.environ  # then the agent has settled project, entity and id
        arguments: dict[str, Any] = {
            "dir": str(self._folder),
            "config": config,
            "name": options.name,
            "project": None if in_sweep else options.project,
            "entity": None if in_sweep else options.entity,
            "id": None if in_sweep and options.group is None else self._run_id(is_only_one=options.group is None),
            "settings": quiet_settings(wandb, options),
        }
        if options.group is not None:  # the runs of the others stay open
            arguments |= {"group": options.group, "reinit": "create_new"}
        run = None
        if online:
            try:
                run = wandb.init(mode=mode or "online", resume=None if in_sweep else "allow", **arguments)
            except Exception as error:
                self._notify(
                    f"wandb: no connection ({described(error)}), so this run is kept offline; {self._how_to_sync()}"
                )
                if not open_mirrors:
                    wandb.teardown()  # because the service would go on holding the run id
        if run is None:
            run = wandb.init(mode="offline", **arguments)
        self._keep_run_id(run.id)
        return run

    def log(self, row: dict[str, Any], step: int) -> None:
        row = {self._prefix + key: value for key, value in row.items()}
        self._attempt(lambda: self._run.log(row, step=step))

    def alert(self, title: str, text: str) -> None:
        self._attempt(lambda: self._run.alert(title=self._prefix + title, text=text, level="WARN", wait_duration=0))

    def log_histogram(self, key: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
        def send() -> None:
            assert self._wandb is not None
            histogram = self._wandb.Histogram(np_histogram=(counts, edges))
            self._run.log({self._prefix + key: histogram}, step=step)

        self._attempt(send)

    def log_artifact(
        self, name: str, artifact_type: str, paths: Sequence[Path], metadata: dict[str, Any], aliases: list[str]
    ) -> None:
        if self._run is None:
            return
        try:
            assert self._wandb is not None
            shown = metadata if len(metadata) <= MOST_METADATA_KEYS else {"cfg": metadata}
            artifact = self._wandb.Artifact(artifact_name(name), artifact_type, metadata=shown)
            for path in paths:
                # The default policy and cache would each copy the weights into the home directory.
                artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=aliases or None)
        except Exception as error:
            # The mirror stays on: a file or a name may be at fault, and metrics can still flow.
            self._notify(f"wandb: artifact {name} was not logged ({described(error)})")

    def finish(self, exit_code: int) -> None:
        """End the wandb run if this mirror opened it, waiting a bounded time for what is still to be uploaded."""
        run, self._run = self._run, None
        open_mirrors.discard(self)
        if run is None or not self._owns_run:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._notify(f"wandb: not everything was uploaded ({described(error)}); {self._how_to_sync()}")
            self._end_session()

    def _attempt(self, send: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            send()
        except Exception as error:
            self._switch_off("lost its connection", error)

    def _switch_off(self, failure: str, error: Exception) -> None:
        self._notify(
            f"wandb: {failure} ({described(error)}); it is off from here on, and metrics go to {METRICS_FILE} alone"
        )
        self._run = None
        if self._owns_run:
            self._end_session()

    def _end_session(self) -> None:
        open_mirrors.discard(self)
        if self._wandb is not None and not open_mirrors:  # because it would end the runs of the others too
            with suppress(Exception):  # because wandb's own exit hook would print a traceback
                self._wandb.teardown()

    def _run_id(self, is_only_one: bool) -> str:
        """Return the one id that the run folder has for life: a resumed run continues the same wandb run."""
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
        return f"to upload it later: wandb sync {shlex.quote(str(self._folder / 'wandb'))}/*run-*"


open_mirrors: set[WandbMirror] = set()
"""The mirrors that have opened a wandb run and not ended it: one for each autoencoder of a run of several."""


def quiet_settings(wandb: ModuleType, options: WandbOptions) -> Any:
    """Return settings under which wandb leaves console, code and git alone and waits a bounded time."""
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


def has_api_key(wandb: ModuleType) -> bool:
    """Return whether wandb can log in without asking: by environment, earlier login or netrc file."""
    settings = wandb.setup().settings
    if settings.api_key or os.environ.get("WANDB_API_KEY") or getattr(settings, "identity_token_file", None):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def artifact_name(name: str) -> str:
    """Return the name without what wandb forbids; a long one keeps its end, where runs differ."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-LONGEST_ARTIFACT_NAME:]


def described(error: Exception) -> str:
    """Return the kind of the error and the first line of its message: wandb's messages run to pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
