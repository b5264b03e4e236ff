"""Run everything that needs a CUDA device, in at most 8 minutes on one H100; `make gpu-check` calls this script.

    python3 scripts/gpu_check.py                            all parts, in the order of PARTS: the most valuable first
    python3 scripts/gpu_check.py --wheels wheels            also the parts that need more than torch, numpy, safetensors
    python3 scripts/gpu_check.py --only kernels --minutes 3
    python3 scripts/gpu_check.py --cpu                      a dry run at tiny sizes, for machines without a GPU

The script needs no virtual environment and no installation: any Python from 3.11 on that has torch, from the
repository's root. Each part is a process of its own with its own time limit. After each figure the whole result is
written again to gpu_check.json and gpu_check.md, whole or not at all, so that a kill loses nothing. What the processes
print goes to gpu_check.log. A part that lacks a package or a device is reported as skipped, with the reason; the exit
status is 1 if a part failed, ran out of time, or if no part did anything.

--wheels names a folder of .whl files. They are unpacked, not installed, and come before the machine's own packages.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository need not be installed

from sae_training.machine.interrupt import without_traceback  # noqa: E402
from scripts.benchmarks.machine import machine_facts  # noqa: E402

PARTS = {
    "device": 60,
    "kernels": 100,
    "steps-768": 80,
    "tests": 80,
    "steps-4096": 110,
    "live": 60,
    "ranks": 90,
    "ahead": 60,
    "sparsify": 60,
}
"""Time limits in seconds, in the order of worth: a part that the budget leaves no time for is the least missed."""

LEAST_SECONDS = 10  # with less left than this, no part is started
CRASHED = 75  # exit status of a part whose CUDA context is lost: the items that are left need a new process


def main(words: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if words is None else words)
    if arguments.item is not None:
        from scripts.benchmarks.gpu_parts import run_part

        return run_part(arguments.only[0], arguments.cpu, arguments.item)
    check = Check(arguments)
    for name in arguments.only:
        check.run(name)
    states = [part["state"] for name, part in check.parts.items() if name != "device" or part["state"] == "failed"]
    print(f"{', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}: {check.out / 'gpu_check.md'}")
    return 0 if {"done", "partly skipped"} & set(states) and not {"failed", "timed out"} & set(states) else 1


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="budget of the whole command (8)")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--wheels", type=Path, help="folder of .whl files that the parts may import from")
    add("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check"), help="$OUT by default")
    add("--cpu", action="store_true", help="a dry run on the CPU, at tiny sizes")
    add("--item", type=int, help=argparse.SUPPRESS)  # inside a part's process: the first item to run
    arguments = parser.parse_args(words)
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels: found no .whl in {arguments.wheels}, expected a folder of them")
    return arguments


class Check:
    """The parts that have run, and the files that say so."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.cpu, self.out = arguments.cpu, arguments.out
        self.end = time.monotonic() + 60 * arguments.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, dict[str, Any]] = {}
        self.machine = machine_facts() | {"dry_run_on_cpu": self.cpu}
        self.environment = environment(arguments)
        self.write()

    def run(self, name: str) -> None:
        """Run one part to its end or its limit, in as many processes as its crashes ask for."""
        start = time.monotonic()
        part: dict[str, Any] = {"state": "running", "items": []}
        self.parts[name] = part
        limit = min(start + PARTS[name], self.end)
        code = CRASHED if limit - start >= LEAST_SECONDS else None
        while code == CRASHED:
            code = self.run_from(name, len(part["items"]), limit)
        part["seconds"] = round(time.monotonic() - start, 1)
        part["state"] = state_of(part["items"], code)
        if code is None:
            part["reason"] = "no time was left for it"
        self.write()
        print(f"{name}: {part['state']} in {part['seconds']} s", file=sys.stderr, flush=True)

    def run_from(self, name: str, first: int, limit: float) -> int:
        """Run a part's items from number `first` on in a new process; its exit status, or -SIGKILL at the limit."""
        items = self.parts[name]["items"]
        command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--only", name, "--item", str(first)]
        with (self.out / "gpu_check.log").open("a", encoding="utf-8") as log:
            print(f"\n===== {name}, from item {first}", file=log, flush=True)
            process = subprocess.Popen(
                command + ["--cpu"] * self.cpu,
                cwd=ROOT,
                env=self.environment | ({"TRITON_INTERPRET": "1"} if self.cpu and name == "kernels" else {}),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that what the part starts can be killed with it
            )
            for line in lines_until(process, limit):
                reply = json.loads(line)
                if reply["state"] == "running":
                    items.append(reply)
                elif items and items[-1]["state"] == "running":
                    items[-1] = reply
                else:  # the part could not even begin
                    items.append(reply)
                if "machine" in reply:
                    self.machine |= reply.pop("machine")
                self.write()
            timed_out = process.poll() is None and time.monotonic() >= limit
            if timed_out:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if items and items[-1]["state"] == "running":
            reason = f"its process ended with status {code}; see gpu_check.log"
            items[-1] |= {"state": "timed out"} if timed_out else {"state": "failed", "reason": reason}
            return -signal.SIGKILL if timed_out else CRASHED
        return -signal.SIGKILL if timed_out else code

    def write(self) -> None:
        whole = {"machine": self.machine, "parts": self.parts}
        write_whole(self.out / "gpu_check.json", json.dumps(whole, indent=2) + "\n")
        write_whole(self.out / "gpu_check.md", "\n".join(markdown(self.machine, self.parts)) + "\n")


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), *unpacked(arguments.wheels), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {"PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    if arguments.cpu:
        changes["CUDA_VISIBLE_DEVICES"] = ""
    return os.environ | changes


def unpacked(wheels: Path | None) -> list[str]:
    """Folders to import from: the wheels' contents, in a temporary folder that stays until the machine goes."""
    if wheels is None:
        return []
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-wheels-"))
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [str(folder), *map(str, folder.glob("*.data/purelib")), *map(str, folder.glob("*.data/platlib"))]


def lines_until(process: subprocess.Popen[str], limit: float) -> Iterator[str]:
    """The lines that the process writes, until it ends or the time is `limit`."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    assert process.stdout is not None
    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            return
        if line is None:
            process.wait()
            return
        yield line


def state_of(items: list[dict[str, Any]], code: int | None) -> str:
    """Return the state of a part: that of its worst item, or whether its items are done, partly skipped or skipped."""
    states = {item["state"] for item in items}
    for worst in ("failed", "timed out"):
        if worst in states:
            return worst
    if code is None:
        return "skipped"
    if code != 0:
        return "timed out" if code == -signal.SIGKILL else "failed"
    if "done" not in states:
        return "skipped"
    return "partly skipped" if "skipped" in states else "done"


def markdown(machine: dict[str, Any], parts: dict[str, dict[str, Any]]) -> list[str]:
    about = [f"{name} {value}" for name, value in machine.items() if isinstance(value, str | int | bool)]
    lines = [f"GPU check: {', '.join(about)}", "", "| part | what | state | figures |", "|---|---|---|---|"]
    for name, part in parts.items():
        for item in part["items"] or [part]:
            figures = ", ".join(f"{key} {shown(value)}" for key, value in item.get("figures", {}).items())
            text = figures or " ".join(item.get("reason", "").split()).replace("|", "/")[:300]
            lines.append(f"| {name} | {item.get('what', '')} | {item['state']} | {text} |")
    return lines


def shown(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 10_000:
        return f"{value:,.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it in, so that no reader and no kill leaves half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    with without_traceback("gpu_check.md and gpu_check.json hold the parts that ended; the same command begins anew."):
        sys.exit(main())
