"""Disturb runs at random moments, let them go on, and compare what they leave with an undisturbed run. Prints JSON.

    sudo python scripts/benchmarks/disturb_runs.py --runs 50 --seed 1

A run trains, trains two autoencoders, writes a cache or builds an analysis, on the demo model and a disk of its own: an
ext4 file system in a file. One to three times it is disturbed, at a moment drawn from all of its time, start-up and end
included:

    kill, term, int   a signal that ends it
    hangup, stop      SIGHUP; SIGSTOP for some seconds, then SIGCONT: it goes on
    full disk         somebody else fills the disk for some seconds
    power cut         the disk is what its file holds at that moment: writes that are not yet flushed are thrown away

After what ends it, the same command goes on. Without the right to mount there is neither a full disk nor a power cut.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, machine_facts
from safetensors.torch import load_file

from sae_training.machine.interrupt import without_traceback
from sae_training.machine.run_files import STATUS_FILE, read_if_sound

EVAL_EVERY = 16  # steps
TRAINED = [
    "--architecture", "topk", "--k", "8", "--auxk_coefficient", "0.03125", "--expansion_factor", "8", "--lr", "1e-3",
    "--checkpoint_every_steps", "4", "--eval_every_steps", str(EVAL_EVERY), "--dead_feature_window", "10",
    "--n_checkpoints", "1", "--total_training_tokens", "81_920", "--train_batch_size", "512", "--context_size", "64",
    "--store_batch_size", "8", "--n_batches_in_buffer", "8", "--n_eval_batches", "4", "--wandb_log_frequency", "1",
    "--log_to_wandb", "False", "--run_dir", ".", "--run_name", "run",
]  # fmt: skip
COMMANDS = {
    "train": ["sae_training", "train", "demo", "demo", "--hook_point", "blocks.1.hook_resid_post", *TRAINED],
    "two layers": ["sae_training", "train", "demo", "demo", "--layers", "0,1", "--hook_point"]
    + ["blocks.{layer}.hook_resid_post", *TRAINED],
    "cache": ["sae_training", "cache", "demo", "demo", "--hook_point", "blocks.1.hook_resid_post", "--form", "both"]
    + ["--total_training_tokens", "120_000", "--context_size", "64", "--store_batch_size", "8"]
    + ["--cached_activations_path", "run"],
    "analysis": ["sae_analysis", "build", "run", "--tokens", "60_000"],
}
DRAWN = ["train", "train", "train", "two layers", "cache", "analysis"]
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hangup": signal.SIGHUP}
MOUNTED = ["full disk", "power cut"]
LEFT = ("metrics.jsonl", "evaluation.json", "*.safetensors", "*.sqlite")
DISK_MEGABYTES = 512
SECONDS_TO_END = 300.0
PLACES = ("start-up", "training", "saving", "evaluating", "caching", "analysis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", default=DRAWN, choices=COMMANDS)
    parser.add_argument("--disturbances", nargs="+", default=[*SIGNALS, "stop", *MOUNTED])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # A shell ignores SIGINT for what it starts in the background, and jobs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = {kind: undisturbed(kind, folder) for kind in dict.fromkeys(given.kinds)}
        can_mount = Disk(folder / "trial").can_mount()
        drawn = [name for name in given.disturbances if can_mount or name not in MOUNTED]
        runs: list[dict[str, Any]] = []
        for number in itertools.count():
            if len(runs) == given.runs:
                break
            run = disturbed(dice.choice(given.kinds), drawn, expected, folder / str(number), dice, can_mount)
            if not run["disturbances"] and not run["different"]:  # it was over before the first moment
                continue
            runs.append(run)
            print(f"{len(runs)}: {json.dumps(run)}", file=sys.stderr)
    is_same = not any(run["different"] for run in runs)
    found = {"same bytes": is_same, "disturbances": counts_of(runs, drawn), "runs": runs}
    print(json.dumps(machine_facts() | {"arguments": vars(given), "mounts": can_mount, "found": found}, indent=2))
    if not is_same:
        raise SystemExit(1)


def counts_of(runs: list[dict[str, Any]], drawn: list[str]) -> dict[str, dict[str, int]]:
    """Return how often each disturbance came at each place."""
    all_ = Counter((told["what"], told["at"]) for run in runs for told in run["disturbances"])
    return {what: {place: all_[what, place] for place in PLACES} for what in drawn}


class Disk:
    """A file system in a file, mounted at `place`; without the right to mount, `place` is a plain folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.image, self.place = folder / "image", folder / "disk"
        self.place.mkdir()

    def can_mount(self) -> bool:
        try:
            self.make()
        except (OSError, subprocess.CalledProcessError):
            return False
        self.unmount()
        return True

    def make(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(DISK_MEGABYTES * 2**20)
        subprocess.run(
            ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(self.image)], check=True, capture_output=True
        )
        self.mount()

    def mount(self) -> None:
        # Nothing reaches the file before it is flushed, or a minute is over: as hard as a power cut can be.
        options = "loop,commit=60,noauto_da_alloc"
        subprocess.run(["mount", "-o", options, str(self.image), str(self.place)], check=True, capture_output=True)

    def unmount(self) -> None:
        for _ in range(100):  # the last of a killed job's processes may still be on the way out
            if subprocess.run(["umount", str(self.place)], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise SystemExit(f"{self.place}: is still in use")

    def fill(self) -> Path:
        filler = self.place / "somebody elses"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass
        return filler

    def cut_power(self, kill: Callable[[], None]) -> None:
        """Keep what the file holds now, and let the job and all that is not flushed go."""
        copy = self.image.with_name("copy")
        subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
        kill()
        self.unmount()
        os.replace(copy, self.image)
        self.mount()


class Job:
    """A command in a process, on a disk."""

    def __init__(self, kind: str, place: Path) -> None:
        self.kind, self.place, self.run = kind, place, place / "run"
        self.said = place.with_name("said.txt")
        with self.said.open("a", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *COMMANDS[kind]], stdout=out, stderr=out, cwd=place, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def send(self, number: signal.Signals) -> None:
        if not self.is_over():
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(SECONDS_TO_END)

    def ending(self) -> str:
        """Return the exit code and, after an error, what it was."""
        code = self.process.returncode
        last = self.said.read_text(encoding="utf-8").strip().splitlines()[-2:]
        return f"{code}: {' '.join(last)}" if code == 1 else str(code)

    def at(self) -> str:
        """Return what it was doing, as its folder shows: one of `PLACES`."""
        if any(self.run.rglob("step_*.tmp")):
            return "saving"
        folder = self.run / "analysis" if self.kind == "analysis" else self.run
        if read_if_sound(folder / STATUS_FILE).get("pid") != self.process.pid:
            return "start-up"
        if self.kind not in ("train", "two layers"):
            return {"cache": "caching", "analysis": "analysis"}[self.kind]
        row = last_row(self.run)
        if row.get("step", 1) % EVAL_EVERY or "metrics/ce_loss_with_sae" in row:
            return "training"
        return "evaluating"


def last_row(run: Path) -> dict[str, Any]:
    """Return the last whole row of the first autoencoder's metrics; none before the first."""
    lines = [line for path in sorted(run.rglob("metrics.jsonl"))[:1] for line in path.read_bytes().split(b"\n")[-2:-1]]
    return json.loads(lines[0]) if lines else {}


def undisturbed(kind: str, folder: Path) -> tuple[float, dict[str, str]]:
    """Return how long a run of the kind takes, and what it leaves."""
    place = folder / kind / "disk"
    place.mkdir(parents=True)
    prepare(kind, folder, place)
    began, job = time.monotonic(), Job(kind, place)
    if job.process.wait():
        raise SystemExit(job.said.read_text(encoding="utf-8"))
    return time.monotonic() - began, left_in(job.run)


def prepare(kind: str, folder: Path, place: Path) -> None:
    """Put there what the command needs: for an analysis, a run that is finished."""
    if kind != "analysis":
        return
    trained = folder / "trained"
    if not trained.exists():
        trained.mkdir()
        if (job := Job("train", trained)).process.wait():
            raise SystemExit(job.said.read_text(encoding="utf-8"))
    shutil.copytree(trained / "run", place / "run")
    os.sync()


def disturbed(
    kind: str, drawn: list[str], expected: dict[str, Any], folder: Path, dice: random.Random, can_mount: bool
) -> dict[str, Any]:
    """Return what became of a run that was disturbed up to three times."""
    seconds, whole = expected[kind]
    disk = Disk(folder)
    if can_mount:
        disk.make()
    prepare(kind, folder.parent, disk.place)
    told: list[dict[str, str]] = []
    job = Job(kind, disk.place)
    try:
        for _ in range(dice.randint(1, 3)):
            time.sleep(dice.uniform(0, seconds))
            if job.is_over():
                break
            told.append({"what": dice.choice(drawn), "at": job.at()})
            disturb(told[-1]["what"], job, disk, dice)
            if job.is_over():
                told[-1]["ended"] = job.ending()
                job = Job(kind, disk.place)
        for _ in range(3):  # an error of a full disk may end it after the disk has room again
            if job.process.wait(SECONDS_TO_END + 5 * seconds) == 0 or not told:
                break
            told[-1]["ended"] = job.ending()
            job = Job(kind, disk.place)
        found = left_in(job.run)
        different = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
        answer = {"kind": kind, "disturbances": told, "different": different}
        return answer | ({"said": job.said.read_text(encoding="utf-8")[-3000:]} if different else {})
    finally:
        job.kill()
        if can_mount:
            disk.unmount()
        shutil.rmtree(folder, ignore_errors=True)


def disturb(what: str, job: Job, disk: Disk, dice: random.Random) -> None:
    match what:
        case "stop":
            job.send(signal.SIGSTOP)
            time.sleep(dice.uniform(0.5, 5))
            job.send(signal.SIGCONT)
        case "full disk":
            filler = disk.fill()
            time.sleep(dice.uniform(0.5, 8))
            filler.unlink()
        case "power cut":
            job.send(signal.SIGSTOP)
            disk.cut_power(job.kill)
        case "hangup":
            job.send(SIGNALS[what])
        case _:
            job.send(SIGNALS[what])
            job.process.wait(SECONDS_TO_END)


def left_in(run: Path) -> dict[str, str]:
    """Return the hashes of what a finished run leaves, without what tells the time; of a database, of its tables.

    Of a cache of contexts it is the rows of all shards: a stop ends a shard, so that they are cut elsewhere.
    """
    paths = [path for pattern in LEFT for path in run.rglob(pattern) if "checkpoints" not in path.parts]
    shards = sorted(path for path in paths if path.parent.name == "contexts")
    found = {
        str(path.relative_to(run)): tables(path) if path.suffix == ".sqlite" else of_file(path)
        for path in paths
        if path not in shards
    }
    return found | ({"contexts": rows_of(shards)} if shards else {})


def rows_of(shards: list[Path]) -> str:
    digests: dict[str, Any] = {}
    for shard in shards:
        for name, tensor in load_file(shard).items():
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests.setdefault(name, hashlib.sha256()).update(data)
    return " ".join(f"{name} {digest.hexdigest()}" for name, digest in sorted(digests.items()))


def of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tables(path: Path) -> str:
    """Return one hash of all rows of a database."""
    digest = hashlib.sha256()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        for (name,) in database.execute("select name from sqlite_master where type = 'table' order by name").fetchall():
            for row in database.execute(f'select * from "{name}" order by 1, 2'):  # noqa: S608 - its own names
                digest.update(repr((name, row)).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    with without_traceback():
        main()
