"""Who works in a folder: a process, told from all others, and whether it lives.

`.holder.json` names the process by its number, its start and its machine, because numbers are given again. While the
process lives, it renews the file's time (the heartbeat). On the same machine number and start decide, whatever the
clock says; elsewhere the heartbeat alone. No torch is imported here, because `sae-training runs` should answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sae_training.machine.run_files import FINAL, HOLDER_FILE, read_if_sound

BEAT_EVERY = 10.0  # seconds
BEAT_LOST_AFTER = 120.0  # seconds without one; the clocks of two machines and a slow network disk take their part

HIDDEN = -1.0  # in place of a start that this process cannot see

Life = Literal["alive", "stopped", "dead"]
"""What the system knows of a process; stopped: by SIGSTOP or Ctrl-Z, until SIGCONT."""

End = Literal["finished", "interrupted", "failed"]
State = Literal["training", End, "lost"]
"""What a job is doing. training: its process lives, whatever its kind; lost: it ended without a word, as by a kill or
a power cut; else what it wrote itself when it ended."""

ENDS: tuple[End, ...] = get_args(End)


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder, and the last sign of its life."""

    pid: int
    host: str
    machine: str
    """What numbers of processes are told apart by: a start of the system, and a container in it (`this_machine`)."""
    start: float
    """When the process started, in the system's own count."""
    since: str
    """When it took the folder."""
    tmux: tuple[str, str] | None = None
    """The socket of the tmux server and the pane in which it runs."""
    beat: float = 0.0
    """When it last gave a sign of life."""

    @property
    def is_here(self) -> bool:
        """Whether the process is one of those that this process sees."""
        return self.machine == this_machine()

    def life(self) -> Life:
        start, life = process(self.pid) if self.is_here else (HIDDEN, "alive")
        if start == HIDDEN:
            return "alive" if time.time() - self.beat < BEAT_LOST_AFTER else "dead"
        return life if start == self.start else "dead"


def this_process(since: str) -> Holder:
    socket_of_tmux, pane = os.environ.get("TMUX", "").split(",")[0], os.environ.get("TMUX_PANE", "")
    return holder_of(os.getpid(), since, (socket_of_tmux, pane) if socket_of_tmux and pane else None)


def holder_of(pid: int, since: str, tmux: tuple[str, str] | None = None) -> Holder:
    """Return the holder that a living process of this machine is."""
    return Holder(pid, socket.gethostname(), this_machine(), process(pid)[0], since, tmux)


def write_holder(folder: Path, holder: Holder) -> None:
    """Write who works in the folder, whole or not at all."""
    values = {name: value for name, value in asdict(holder).items() if name != "beat"}
    partial = folder / f"{HOLDER_FILE}.tmp"
    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(partial, folder / HOLDER_FILE)


def read_holder(folder: Path) -> Holder | None:
    """Return who works in the folder, or did when it was killed; None if nobody, or if an earlier version wrote it."""
    file = folder / HOLDER_FILE
    values = read_if_sound(file)
    tmux = values.get("tmux")
    try:
        return Holder(**values | {"tmux": tuple(tmux) if tmux else None, "beat": file.stat().st_mtime})
    except (OSError, TypeError):
        return None


def state_of(folder: Path, status: Mapping[str, Any], holder: Holder | None) -> tuple[State, Life]:
    """Return what the job in a folder is doing, and what is known of its process; dead: none works for it.

    `holder` is to be read before `status`, because a job that ends writes its status first, and then lets go.
    """
    written = status.get("state")
    # Whoever works here now may have written nothing yet, and a process that lives on may have ended its job.
    has_ended = written in ENDS and holder is not None and holder.since == status.get("started")
    life = "dead" if holder is None or has_ended else holder.life()
    if life != "dead":
        return "training", life
    if written in ENDS:
        return written, life
    return "finished" if (folder / FINAL).is_dir() else "lost", life


class Heartbeat:
    """A thread that renews the time of a file while the process lives, or until `stop()`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.ended = threading.Event()
        threading.Thread(target=self.beat, name="heartbeat", daemon=True).start()

    def beat(self) -> None:
        while not self.ended.wait(BEAT_EVERY):
            with contextlib.suppress(OSError):  # the folder may be gone, or its disk for a while
                os.utime(self.file)

    def stop(self) -> None:
        self.ended.set()


# ----------------------------------------------------------------------------------------------- what the system knows


def this_machine() -> str:
    """Return what is the same for processes that see each other by their numbers, and for no others.

    On Linux a start of the system and a container. Elsewhere the name of the host.
    """
    if sys.platform != "linux":
        return socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process(pid: int) -> tuple[float, Life]:
    """Return when a process started, in a count that setting the clock leaves alone, and whether it lives.

    A process that has ended, and that its parent has not asked about yet, is dead.
    """
    if sys.platform == "linux":
        try:
            # The name in brackets may hold spaces and brackets. After it: the state, and as the 20th word the start.
            words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return (HIDDEN, "alive") if is_others(pid) else (0.0, "dead")
        return float(words[19]), "dead" if words[0] in "ZX" else "stopped" if words[0] in "Tt" else "alive"
    import psutil  # takes 30 ms

    try:
        found = psutil.Process(pid)
        state = found.status()
        life: Life = "stopped" if state == psutil.STATUS_STOPPED else "alive"
        return found.create_time(), "dead" if state == psutil.STATUS_ZOMBIE else life
    except psutil.Error:
        return 0.0, "dead"


def is_others(pid: int) -> bool:
    """Return whether there is such a process of another user, whom the system may hide from this one."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False
