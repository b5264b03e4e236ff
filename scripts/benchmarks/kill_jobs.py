"""Kill jobs of several processes at random moments, let them go on, and compare what they leave. Prints JSON.

    python scripts/benchmarks/kill_jobs.py --modes data latents layers cache --kills 10

Each mode runs on the demo model under torchrun (gloo, one thread a process), with a checkpoint every 4 steps and an
evaluation, which takes as long as 40 steps, every 8. Up to three times in a run SIGKILL ends one process of it, or all
with torchrun, at a moment drawn at random. The same command then goes on. What is left in the end is compared, byte for
byte, with what an undisturbed job leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import ROOT, machine_facts

from sae_training.machine.interrupt import without_traceback

HOOK = ["--hook_point", "blocks.1.hook_resid_post"]
TRAINED = [
    "--architecture", "topk", "--k", "8", "--auxk_coefficient", "0.03125", "--expansion_factor", "8", "--lr", "1e-3",
    "--checkpoint_every_steps", "4", "--eval_every_steps", "8", "--dead_feature_window", "10",
    "--total_training_tokens", "40_960", "--train_batch_size", "512", "--context_size", "64", "--store_batch_size", "8",
    "--n_batches_in_buffer", "8", "--n_eval_batches", "4", "--wandb_log_frequency", "4", "--log_to_wandb", "False",
]  # fmt: skip
MODES: dict[str, tuple[int, list[str]]] = {
    "data": (2, ["train", "demo", "demo", *HOOK, *TRAINED, "--parallel", "data"]),
    "latents": (2, ["train", "demo", "demo", *HOOK, *TRAINED, "--parallel", "latents"]),
    "layers": (
        2,
        ["train", "demo", "demo", "--hook_point", "blocks.{layer}.hook_resid_post", "--layers", "0,2", *TRAINED]
        + ["--parallel", "layers"],
    ),
    "data,latents": (4, ["train", "demo", "demo", *HOOK, *TRAINED, "--parallel", "data,latents", "--mesh", "2,2"]),
    "cache": (
        2,
        ["cache", "demo", "demo", *HOOK, "--total_training_tokens", "400_000", "--context_size", "64"]
        + ["--store_batch_size", "8", "--form", "both"],
    ),
}
"""The number of processes of each mode, and its command."""
LEFT = ("metrics.jsonl", "evaluation.json", "manifest.json", "*.safetensors")
KILLS_OF_A_RUN = 3
SECONDS_TO_END = 60.0  # after which a job that has lost a process counts as hanging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--kills", type=int, default=10, help="in each mode")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = {
            mode: kills_of(mode, given.kills, random.Random(given.seed), Path(name) / mode) for mode in given.modes
        }
    print(json.dumps(machine_facts() | {"arguments": vars(given), "found": found}, indent=2))
    if not all(of_mode["same bytes"] for of_mode in found.values()):
        raise SystemExit(1)


class Job:
    """A job under torchrun in a folder, with what it says in a file there."""

    def __init__(self, mode: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.n, words = MODES[mode]
        self.run = folder / "run"
        place = ["--run_dir", str(folder), "--run_name", "run"]
        if mode == "cache":
            place = ["--cached_activations_path", str(self.run)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.n)]
        self.said = folder / "said.txt"
        self.said_before = self.said.read_text(encoding="utf-8") if self.said.is_file() else ""
        with self.said.open("a") as out:
            self.process = subprocess.Popen(
                [*launcher, "-m", "sae_training", *words, *place], stdout=out, stderr=out, cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, start_new_session=True,
            )  # fmt: skip

    def begun(self) -> bool:
        """Wait until the job says more than that it starts; return whether it runs still."""
        while self.process.poll() is None:
            said = self.said.read_text(encoding="utf-8")[len(self.said_before) :]
            if any(line.strip() not in ("", "starting ...") for line in said.splitlines()):
                return True
            time.sleep(0.05)
        return False

    def is_finished(self) -> bool:
        """Return whether the run is finished; the processes take some seconds more to end."""
        return state_of(self.run).startswith("finished")

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="utf-8")
        return [int(pid) for pid in children.split()][: self.n]

    def kill(self, all_of_it: bool, dice: random.Random) -> float:
        """Kill it, or one of its processes; return the seconds until all of it has ended."""
        start = time.monotonic()
        if all_of_it:
            os.killpg(self.process.pid, signal.SIGKILL)
            for pid in self.workers():  # which torchrun has put into sessions of their own
                os.kill(pid, signal.SIGKILL)
        else:
            os.kill(dice.choice(self.workers()), signal.SIGKILL)
        self.process.wait(SECONDS_TO_END)
        return time.monotonic() - start

    def done(self) -> None:
        if self.process.wait():
            raise SystemExit(self.said.read_text(encoding="utf-8"))


def kills_of(mode: str, n_kills: int, dice: random.Random, folder: Path) -> dict[str, Any]:
    """Return what became of so many kills in runs of a mode."""
    job = Job(mode, folder / "undisturbed")
    job.begun()
    start = time.monotonic()
    job.done()
    seconds, expected = time.monotonic() - start, left_in(job.run)
    kills: list[dict[str, Any]] = []
    different: list[str] = []
    n_runs = 0
    while len(kills) < n_kills:
        n_runs += 1
        place = folder / str(n_runs)
        for _ in range(min(KILLS_OF_A_RUN, n_kills - len(kills))):
            job = Job(mode, place)
            if job.begun():
                time.sleep(dice.uniform(0, seconds))
            if job.process.poll() is not None or job.is_finished() or not (workers := job.workers()):
                job.process.wait()
                break
            all_of_it = dice.random() < 0.5
            kills.append({"killed": "all" if all_of_it else f"one of {len(workers)}", "at": state_of(job.run)})
            kills[-1]["seconds to end"] = round(job.kill(all_of_it, dice), 1)
        Job(mode, place).done()
        found = left_in(job.run)
        names = sorted(found.keys() | expected.keys())
        different += [f"{n_runs}/{name}" for name in names if found.get(name) != expected.get(name)]
    return {"same bytes": not different, "different": different, "runs": n_runs, "kills": kills}


def left_in(run: Path) -> dict[str, bytes]:
    """Return the content of the files that a finished job leaves, but what tells the time."""
    paths = [path for pattern in LEFT for path in run.rglob(pattern) if "checkpoints" not in path.parts]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def state_of(run: Path) -> str:
    """Return what the job was doing, as its folder shows."""
    if any(run.rglob("step_*.tmp")):
        return "saving"
    status = run / "status.json"
    if not status.is_file():
        n, shuffled = (len([*run.rglob(pattern)]) for pattern in ("*.bin", "rows/*.safetensors"))
        return f"{n} files of buckets, {shuffled} shards" if "cache" in run.parts else "starting"
    told = json.loads(status.read_text(encoding="utf-8"))
    return f"{told['state']}, step {told['step']}"


if __name__ == "__main__":
    with without_traceback():
        main()
