"""A mirror of metrics.jsonl in wandb, kept by a thread of its own.

A step is written to the file and training goes on; the thread reads the file and sends what wandb does not hold. So
nothing of wandb holds up a step, a slow wandb is late and misses nothing, and what was not sent is still in the file.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sae_training.machine.paths import command
from sae_training.machine.run_files import METRICS_FILE
from sae_training.run import wandb_run
from sae_training.run.wandb_run import Artifact, Notify, WandbOptions, WandbRun, described

POLL_S = 0.5
SILENT_S = 60.0  # without an answer, after which it is said that wandb is behind
OPENINGS = 4  # of the wandb run in one process: the first, and after each of three losses of the connection
PAUSE_S = 2.0  # before it is opened again, because wandb names its files by the second
GRACE_S = 10.0  # beside finish_timeout_s, in which wandb itself is to give up, for each run that is still open
STOP_S = 10.0  # for a run that failed or was stopped, which what stopped it may soon kill
WRITES_S = 5.0  # after its end, in which wandb's files are to have all steps
MOST_AT_ONCE = 1_000  # steps of a mirror, so that those of one run stay near each other
MOST_AHEAD = 50  # steps in one wandb run before an autoencoder without new rows, as one that failed, is not waited for
MOST_BESIDE = 10_000  # steps whose values beside the file are kept for a wandb that is behind


class Replaced(Exception):
    """The service process has failed for another mirror, which has ended it."""


class Steps:
    """The steps of a metrics.jsonl that grows, each as one row, once it is whole: when a row of a later step follows.

    A step may have several rows, and an interrupted run writes the rest of its last step when it goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._step: int | None = None
        self._row: dict[str, Any] = {}

    def new(self, is_complete: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield steps and rows that were not yielded before; the last one too, if the file `is_complete`."""
        with self._path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                step = row.pop("step")
                if step != self._step:
                    yield from self._take()
                    self._step = step
                self._row |= row
                self._place += len(line)  # after the yield, because the caller may ask for no more
        if is_complete:
            yield from self._take()

    def _take(self) -> Iterator[tuple[int, dict[str, Any]]]:
        step, row, self._step, self._row = self._step, self._row, None, {}
        if step is not None:
            yield step, row


@dataclass
class Session:
    """What the mirrors of this process share, because wandb's one service process serves them all."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    """Whose holder alone calls wandb."""
    mirrors: set[WandbMirror] = field(default_factory=set)
    number: int = 0
    """Which service process it is: runs of an earlier one are lost."""
    is_offline: bool = False
    is_given_up: bool = False
    deadline: float | None = None
    """When waiting for the mirrors that are being finished ends."""
    has_begun: bool = False
    """Whether training logs, or has ended: all mirrors have started then."""
    waiting: list[tuple[int, WandbRun, dict[str, Any]]] = field(default_factory=list)
    """Steps for the caller's run that not all mirrors in it have reached."""

    def send_joined(self) -> None:
        """Send to the caller's run, in order, the steps that all mirrors in it have reached: it drops earlier ones."""
        if not self.has_begun:
            return
        mirrors = [*self.mirrors]  # which another thread may change
        reached = min((mirror.reached for mirror in mirrors), default=math.inf)
        ready = sorted((item for item in self.waiting if item[0] <= reached), key=lambda item: item[0])
        self.waiting = [item for item in self.waiting if item[0] > reached]
        for step, run, row in ready:
            run.log(step, row)
        if len({step for step, _, _ in self.waiting}) > MOST_AHEAD:
            for mirror in mirrors:
                mirror.is_behind = mirror.reached == reached


session = Session()


class WandbMirror:
    """The wandb run of one autoencoder, which may fail at any point; `notify` is told what goes wrong, once."""

    def __init__(self, folder: Path, notify: Notify) -> None:
        self._folder = folder
        self._notify = notify
        self._thread: threading.Thread | None = None
        self._run: WandbRun | None = None
        self._number = 0
        self._beside: dict[int, dict[str, Any]] = {}
        self._beside_lock = threading.Lock()
        self._artifacts: list[Artifact] = []
        self._alerts: list[tuple[str, str]] = []
        self._sent = set[int]()
        self.reached: float = -1
        """The last step that was read; infinite once there are no more."""
        self.is_behind = False
        """Whether others in the same wandb run wait for this one; if it has nothing new then, they wait no more."""
        self._ending = threading.Event()
        self._exit_code = 0
        self._waits_since: float | None = None
        self._said_silent = self._said_late = self._has_all = False

    def start(self, options: WandbOptions, config: dict[str, Any]) -> None:
        """Begin to send: to the wandb run that the caller has opened, or to one of its own.

        A mode of "disabled" sends nothing.
        """
        if options.wanted_mode == "disabled":
            return
        self._options, self._config = options, config
        try:
            self._joined = wandb_run.callers_run()
        except ImportError as error:
            self._notify(f"wandb: cannot be imported ({error}); metrics go to {METRICS_FILE} alone")
            return
        if not session.mirrors:
            session.is_offline, session.is_given_up, session.deadline = False, False, None
            session.has_begun, session.waiting = False, []
        session.mirrors.add(self)
        self._thread = threading.Thread(target=self._work, name=f"wandb mirror of {self._folder.name}", daemon=True)
        self._thread.start()

    def log_beside(self, values: Mapping[str, Any], step: int) -> None:
        """Add values that metrics.jsonl does not hold to those of a step."""
        if self._thread is None or not self._thread.is_alive():
            return
        with self._beside_lock:
            self._beside.setdefault(step, {}).update(values)
            if len(self._beside) > MOST_BESIDE:
                del self._beside[next(iter(self._beside))]

    def log_artifact(self, artifact: Artifact) -> None:
        self._artifacts.append(artifact)

    def alert(self, title: str, text: str) -> None:
        self._alerts.append((title, text))

    def check(self) -> None:
        """Say once if wandb has not answered for long. Training logs, so all mirrors have started: the rows may go."""
        session.has_begun = True
        since = self._waits_since
        if since is not None and not self._said_silent and time.monotonic() - since > SILENT_S:
            self._said_silent = True
            self._notify(f"wandb: no answer for {SILENT_S:.0f} s; training goes on, and rows wait in {METRICS_FILE}")

    def finish(self, exit_code: int) -> None:
        """End the wandb run if this mirror opened it, waiting a bounded time for what is still to be sent.

        Mirrors end one after the other, each in its own time as long as wandb takes all that it is sent. From the first
        one on that it does not, or whose run failed or was stopped, they share one short time.

        The last step of a run that failed or was stopped is not sent: the run that goes on may add to it.
        """
        if self._thread is None:
            return
        self._exit_code = exit_code
        session.has_begun = True
        self._ending.set()
        if self._thread.is_alive():
            self._wait_for(self._thread)
        session.mirrors.discard(self)

    def _wait_for(self, thread: threading.Thread) -> None:
        now = time.monotonic()
        allowed = STOP_S if self._exit_code else self._options.finish_timeout_s + GRACE_S * len(session.mirrors)
        deadline = session.deadline or now + allowed
        bound = max(0.0, deadline - now)
        thread.join(bound)
        if self._exit_code:
            session.deadline = deadline
        else:
            session.deadline = None if self._has_all else min(deadline, time.monotonic() + GRACE_S)
        if thread.is_alive() and not session.is_given_up:
            if not self._said_late:
                self._say(f"wandb: did not end within {bound:.0f} s; {self._how_to_sync()}")
            session.is_given_up = True
            if self._joined is None:  # because the caller's own goes on
                wandb_run.end_service(at_once=True)

    # ---------------------------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        try:
            self._keep_sending()
        finally:
            self.reached = math.inf

    def _keep_sending(self) -> None:
        for left in reversed(range(OPENINGS)):
            is_open = False
            try:
                self._open(is_again=left < OPENINGS - 1)
                is_open = True
                self._follow()
                return
            except Exception as error:
                if session.is_given_up:
                    return
                if isinstance(error, Replaced):
                    continue
                is_last = left == 0 or not is_open or self._joined is not None
                what = "lost its connection" if is_open else "could not be started"
                then = f"it is off from here on; {self._how_to_sync()}" if is_last else "it is opened anew"
                self._notify(f"wandb: {what} ({described(error)}); {then}")
                self._end_session()
                if is_last:
                    return
            time.sleep(PAUSE_S)

    def _open(self, is_again: bool) -> None:
        with self._asking():
            if self._joined is not None:
                self._run = wandb_run.join(self._joined, self._folder, self._options, self._config)
            else:
                self._run = self._open_own(is_again)
            self._number = session.number

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Call wandb alone. The wait for the other mirrors that do so is no wait for wandb."""
        with session.lock:
            self._waits_since = time.monotonic()
            try:
                yield
            finally:
                self._waits_since = None

    def _open_own(self, is_again: bool) -> WandbRun:
        online = self._options.wanted_mode not in ("offline", "dryrun") and not session.is_offline
        if online and not wandb_run.has_api_key():
            # Without this wandb would ask for a key at the terminal, and wait for the answer.
            self._notify(f"wandb: no API key found, so this run is kept offline; {self._how_to_sync()}")
            online = False
        if online:
            try:
                return wandb_run.open_run(self._folder, self._options, self._config, True, is_again)
            except Exception as error:
                if session.is_given_up:
                    raise
                self._notify(
                    f"wandb: no connection ({described(error)}), so this run is kept offline; {self._how_to_sync()}"
                )
                if all(other._run is None for other in [*session.mirrors]):
                    wandb_run.end_service()  # because it would go on holding the run id
        session.is_offline = True
        return wandb_run.open_run(self._folder, self._options, self._config, False, is_again)

    def _follow(self) -> None:
        """Send what metrics.jsonl holds and will hold, until the end."""
        steps, n_artifacts = Steps(self._folder / METRICS_FILE), 0
        has_ended = has_stopped = False
        while not has_ended:
            has_ended = self._ending.wait(POLL_S)
            with self._asking():
                if self._number != session.number:
                    raise Replaced
                run = self._run
                assert run is not None
                new = steps.new(is_complete=has_ended and self._exit_code == 0)
                n_new = self._take(run, islice(new, None if has_ended else MOST_AT_ONCE))
                if self.is_behind and n_new == 0:
                    self._take(run, steps.new(is_complete=True))
                    has_stopped = True
                self.is_behind = False
                if has_ended or has_stopped:
                    self.reached = math.inf
                session.send_joined()
                while self._alerts:
                    run.alert(*self._alerts.pop(0))
                # One at a time, because each may take long, and rows that have come since go first.
                for artifact in self._artifacts[n_artifacts : None if has_ended else n_artifacts + 1]:
                    self._send_artifact(run, artifact)
                    n_artifacts += 1
                if has_ended:
                    self._finish_run(run)

    def _take(self, run: WandbRun, new: Iterator[tuple[int, dict[str, Any]]]) -> int:
        """Log the new steps, or let them wait for those of the others in the caller's run; return how many they are."""
        n_new = 0
        for step, row in new:
            with self._beside_lock:
                row |= self._beside.pop(step, {})
            if not run.has(step) and run.is_own:
                run.log(step, row)
                self._sent.add(step)
            elif not run.has(step):
                session.waiting.append((step, run, row))
            self.reached, n_new = step, n_new + 1
        return n_new

    def _send_artifact(self, run: WandbRun, artifact: Artifact) -> None:
        try:
            run.log_artifact(artifact)
        except ConnectionError:
            raise
        except Exception as error:
            # The mirror stays on: a file, a name or the server may be at fault, and metrics can still flow.
            self._say(f"wandb: artifact {artifact.name} was not logged ({described(error)}); {self._how_to_sync()}")

    def _finish_run(self, run: WandbRun) -> None:
        is_offline, run_id = run.is_offline, run.run.id
        try:
            run.finish(self._exit_code)
        except TimeoutError as error:
            self._said_late = True
            self._say(f"wandb: not everything was uploaded ({described(error)}); {self._how_to_sync()}")
            if session.mirrors == {self}:  # because it would end the runs of the others too
                wandb_run.end_service()
            return
        self._has_all = True
        if run.is_own and is_offline and (lost := self._not_in_files(run_id)):
            self._notify(
                f"wandb: its files lack {len(lost)} steps, from step {min(lost)} on, as after a disk that was full; "
                f"{self._how_to_sync()}"
            )

    def _not_in_files(self, run_id: str) -> set[int]:
        """Return the steps that were sent, but are not in wandb's files once it has had time to write them."""
        deadline = time.monotonic() + WRITES_S
        while (lost := self._sent - wandb_run.in_files(self._folder, run_id)[0]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return lost

    def _end_session(self) -> None:
        """End the service process, which has failed, unless another mirror has done so; a caller's own goes on."""
        if self._joined is not None:
            return
        with session.lock:
            is_in_use = any(other._run is not None for other in [*session.mirrors])
            if self._number == session.number if self._run is not None else not is_in_use:
                session.number += 1
                wandb_run.end_service()
            self._run = None

    def _say(self, message: str) -> None:
        if not session.is_given_up:  # which was said
            self._notify(message)

    def _how_to_sync(self) -> str:
        if self._options.group is None:
            return f"to send later what is missing: {command('sync', self._folder)}"
        what = "what is missing" if self._joined is None else "all, to a wandb run of each autoencoder's own"
        return f"to send later {what}: {command('sync', self._folder.parent)}"
