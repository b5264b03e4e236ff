"""Times one training step of ours and of other packages, against the dense matmuls that such a step is made of.

    python scripts/benchmarks/bench_step.py             topk and standard, ours and the peers'
    ... --ours topk 'topk:{"encoder_matmul_dtype": "float32"}' --peers
    ... --ours topk --dead-share 0.5                    also with AuxK at work on half of the latents
    ... --sweep --sweep-peers                           how the step grows with width and sparsity

A step is all that a system's own trainer does with a batch in memory: forward, backward, optimizer, decoder norm,
counters; weights are float32. Each system has its own process (`bench_workers.py`), and each peer its own virtual
environment, installed at its first use into ~/.cache/sae-training/peers. All processes stay alive and take turns, so
that one computes at a time; the figures are medians over the rounds. ReLU-type systems start with an encoder bias at
which --l0 latents fire per row, and keep that L0 because the learning rate is tiny. The floors are matmuls into
allocated memory; those in bfloat16 are left out where the processor has no instructions for it. The result is JSON on
stdout; a table goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_training.machine.interrupt import without_traceback
from sae_training.machine.precision import bfloat16_is_fast
from scripts.benchmarks.machine import machine_facts

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().with_name("bench_workers.py")
PEERS_FOLDER = Path.home() / ".cache" / "sae-training" / "peers"
TORCH = "torch==2.13.0"
ALL = {name: (name,) for name in ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")}


@dataclass(frozen=True)
class Peer:
    requirement: str
    architectures: dict[str, tuple[str, ...]]
    """The peer's systems for each architecture of ours."""
    unwanted: str | None = None
    """Package that comes along and breaks the import."""


PEERS = {
    "sae-lens": Peer("sae-lens==6.54.12", ALL),
    "eai-sparsify": Peer("eai-sparsify==1.3.3", {"topk": ("topk-adam", "topk-signum")}),
    "dictionary-learning": Peer("dictionary-learning==0.1.0", ALL, unwanted="torchvision"),
}
FLOORS = ("encoder-float32", "encoder-bfloat16", "six-float32", "six-bfloat16")
USES_AUXK = ("topk", "batchtopk", "matryoshka")
SWEEP_FACTORS = (7, 14, 28, 57, 114, 228)  # d_sae 4,032 to 131,328 at d_in 576
SWEEP_KS = (16, 32, 64, 128, 256)
SWEEP_FACTOR_OF_KS = 28


class Failed(Exception):
    """Raised for a system that cannot be installed, built or run; the others go on."""


@dataclass
class Entry:
    """A system to be timed."""

    label: str
    system: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    dead_share: float = 0.0

    @property
    def is_floor(self) -> bool:
        return self.system == "floors"

    @property
    def family(self) -> tuple[str, bool]:
        """What makes two systems comparable: the architecture, and whether AuxK is at work."""
        return self.architecture.split("-")[0], self.dead_share > 0


def main() -> None:
    arguments = parse(sys.argv[1:])
    left_out: dict[str, str] = {}
    wanted = arguments.peers if arguments.sweep_peers or not arguments.sweep else []
    pythons = peer_pythons(wanted, arguments.peer_python, left_out)
    if arguments.sweep:
        points = [measure(arguments, pythons, *point) for point in sweep_points(arguments)]
        result = {"machine": machine(arguments) | rounds(arguments), "left_out": left_out, "points": points}
        show(sweep_table(points))
    else:
        factor = arguments.d_sae // arguments.d_in
        point = measure(arguments, pythons, factor, arguments.k, arguments.l0)
        left_out |= point.pop("left_out")
        result = {"machine": machine(arguments) | rounds(arguments), "left_out": left_out, **point}
        show(table(result))
        show([f"left out: {name}: {reason}" for name, reason in result["left_out"].items()])
    print(json.dumps(result, indent=2))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--d-in", type=int, help="width of the activations (512; 576 with --sweep)")
    add("--d-sae", type=int, default=8192, help="latents, a multiple of d_in")
    add("--batch", type=int, default=4096, help="rows of a step")
    add("--k", type=int, default=32, help="active latents per row, TopK-type")
    add("--l0", type=float, default=80, help="active latents per row, ReLU-type")
    add("--ours", nargs="*", default=["topk", "standard"], help="architectures, each with ':{JSON}' of config fields")
    add("--ours-config", type=json.loads, default={}, help="JSON object of config fields for all of ours")
    add("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="none after it: no peers")
    add("--peer-architectures", nargs="*", choices=ALL, help="those of --ours by default")
    add("--peer-python", action="append", default=[], metavar="PEER=PYTHON", help="interpreter that has the peer")
    add("--dead-share", type=float, default=0.0, help="time AuxK too, with this share of the latents held dead")
    add("--rounds", type=int, default=9)
    add("--steps", type=int, default=2, help="timed steps per turn, after one that is not")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--sweep", action="store_true", help="over d_sae at --k and --l0, then over k (for ReLU-type: L0)")
    add("--sweep-factors", type=int, nargs="*", default=SWEEP_FACTORS, help="d_sae / d_in")
    add("--sweep-ks", type=int, nargs="*", default=SWEEP_KS)
    add("--sweep-peers", action="store_true", help="with the peers, where all fit in memory together")
    arguments = parser.parse_args(words)
    if arguments.d_in is None:
        arguments.d_in = 576 if arguments.sweep else 512
    if arguments.d_sae % arguments.d_in and not arguments.sweep:
        parser.error(f"--d-sae: found {arguments.d_sae}, expected a multiple of --d-in ({arguments.d_in})")
    if not 0 <= arguments.dead_share < 1:
        parser.error(f"--dead-share: found {arguments.dead_share}, expected 0 or more and less than 1")
    if arguments.rounds < 1 or arguments.steps < 1:
        parser.error("--rounds and --steps: expected at least 1")
    check_peer_pythons(parser, arguments.peer_python)
    try:
        arguments.ours = [(word, *architecture_and_config(word)) for word in arguments.ours]
    except json.JSONDecodeError as error:
        parser.error(f"--ours: expected NAME or NAME:{{JSON}}; {error}")
    return arguments


def check_peer_pythons(parser: argparse.ArgumentParser, given_words: list[str]) -> None:
    if unknown := [word for word in given_words if word.partition("=")[0] not in PEERS]:
        parser.error(f"--peer-python: found {unknown[0]!r}, expected PEER=PYTHON with one of {', '.join(PEERS)}")


def architecture_and_config(word: str) -> tuple[str, dict[str, Any]]:
    name, _, config = word.partition(":")
    return name, json.loads(config or "{}")


# ------------------------------------------------------------------------------------------------------- the systems


def entries(arguments: argparse.Namespace, peers: list[str]) -> list[Entry]:
    floors = FLOORS[:2] if arguments.sweep else FLOORS
    found = [Entry(f"floor/{name}", "floors", name) for name in floors if floor_problem(name, arguments.device) is None]
    for word, architecture, config in arguments.ours:
        found.append(Entry(f"ours/{word}", "ours", architecture, arguments.ours_config | config))
    architectures = arguments.peer_architectures
    if architectures is None:
        architectures = dict.fromkeys(architecture for _, architecture, _ in arguments.ours)
    for peer in peers:
        for ours in architectures:
            for name in PEERS[peer].architectures.get(ours, ()):
                found.append(Entry(f"{peer}/{name}", peer, name))
    if arguments.dead_share > 0:
        for entry in list(found):
            if entry.family[0] in USES_AUXK:
                with_auxk = Entry(f"{entry.label}+auxk", entry.system, entry.architecture, entry.config)
                with_auxk.dead_share = arguments.dead_share
                found.append(with_auxk)
    return found


def floor_problem(name: str, device: str) -> str | None:
    """Why a floor is not timed on `device`; None if it is."""
    if not name.endswith("bfloat16") or bfloat16_is_fast(device):
        return None
    return f"bfloat16 products have no instructions of their own on this {device}, and would take minutes"


def sweep_points(arguments: argparse.Namespace) -> list[tuple[int, int, float]]:
    """Return (d_sae / d_in, k, L0): first the widths, then the sparsities at one width."""
    factors = list(arguments.sweep_factors)
    middle = SWEEP_FACTOR_OF_KS if SWEEP_FACTOR_OF_KS in factors or not factors else factors[len(factors) // 2]
    widths = [(factor, arguments.k, arguments.l0) for factor in factors]
    return widths + [(middle, k, float(k)) for k in arguments.sweep_ks if k <= middle * arguments.d_in]


# ------------------------------------------------------------------------------------------------------------- peers


def peer_pythons(wanted: Iterable[str], given_words: list[str], left_out: dict[str, str]) -> dict[str, str]:
    """Return the interpreter of each wanted peer. Peers without one go into `left_out` with the reason.

    `given_words` are PEER=PYTHON.
    """
    given = dict(word.split("=", 1) for word in given_words)
    pythons = {}
    for name in wanted:
        try:
            pythons[name] = given.get(name) or str(set_up(name))
        except Failed as error:
            left_out[name] = str(error)
    return pythons


def set_up(name: str) -> Path:
    """Return the interpreter of a peer's virtual environment, which is made and filled first if it is incomplete."""
    peer, folder = PEERS[name], PEERS_FOLDER / name
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    if marker.exists() and marker.read_text() == peer.requirement:
        return python
    show([f"installing {peer.requirement} into {folder} (some minutes)"])
    call([sys.executable, "-m", "venv", str(folder)], name)
    call([str(python), "-m", "pip", "install", "--quiet", TORCH, peer.requirement], name)
    if peer.unwanted is not None:
        call([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", peer.unwanted], name)
    marker.write_text(peer.requirement)
    return python


def call(command: list[str], name: str) -> None:
    try:
        done = subprocess.run(["nice", "-n", "10", *command], capture_output=True, text=True)
    except OSError as error:
        raise Failed(f"cannot install {name}: {error}") from None
    if done.returncode != 0:
        raise Failed(f"cannot install {name}: `{' '.join(command)}` failed: {last_lines(done.stderr)}")


def last_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return " | ".join(lines[-3:])


# ------------------------------------------------------------------------------------------------------- measurement


class Worker:
    """A process that holds one system; `bench_workers.py` says what it answers."""

    def __init__(self, entry: Entry, python: str, arguments: argparse.Namespace) -> None:
        self.entry = entry
        self.times: list[float] = []
        self.about: dict[str, Any] = {}
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [python, str(WORKERS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env=environment(entry, arguments),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing reply says so below
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.stderr.seek(0)
            killed = " (out of memory?)" if code == -9 else ""
            raise Failed(f"its process ended with status {code}{killed}: {last_lines(self.stderr.read())}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(" ".join(reply["error"].split()))
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()


def environment(entry: Entry, arguments: argparse.Namespace) -> dict[str, str]:
    threads = str(arguments.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
    if entry.system in ("ours", "floors"):
        # PYTHONPATH comes first, so that another checkout of ours can be measured.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(ROOT)]))
    elif not any(word.startswith(f"{entry.system}=") for word in arguments.peer_python):
        env.pop("PYTHONPATH", None)
    return env


def measure(arguments: argparse.Namespace, pythons: dict[str, str], factor: int, k: int, l0: float) -> dict[str, Any]:
    """Build every system at one size, let the systems take turns, and return their figures."""
    sizes = {
        "d_in": arguments.d_in,
        "d_sae": arguments.d_in * factor,
        "batch": arguments.batch,
        "k": k,
        "l0": l0,
        "device": arguments.device,
    }
    show([f"d_in {sizes['d_in']}, d_sae {sizes['d_sae']}, batch {sizes['batch']}, k {k}, L0 {l0:g}"])
    problems = {f"floor/{name}": floor_problem(name, arguments.device) for name in FLOORS}
    left_out = {name: problem for name, problem in problems.items() if problem is not None}
    workers: list[Worker] = []
    with ExitStack() as stack:
        for entry in entries(arguments, list(pythons)):
            try:
                worker = Worker(entry, pythons.get(entry.system, sys.executable), arguments)
                stack.callback(worker.close)
                its_sizes = sizes | {"config": entry.config, "dead_share": entry.dead_share}
                worker.about = worker.ask(
                    do="build", system=entry.system, architecture=entry.architecture, sizes=its_sizes
                )
                workers.append(worker)
            except (Failed, OSError) as error:
                left_out[entry.label] = str(error)
        for _ in range(arguments.rounds):
            workers = attempt(workers, left_out, lambda worker: take_turn(worker, arguments.steps))
        workers = attempt(workers, left_out, lambda worker: worker.about.update(worker.ask(do="finish")))
    return {"sizes": sizes, **figures(workers), "left_out": left_out}


def attempt(workers: list[Worker], left_out: dict[str, str], action: Callable[[Worker], None]) -> list[Worker]:
    """Do `action` with each worker, and return the workers that could."""
    able = []
    for worker in workers:
        try:
            action(worker)
            able.append(worker)
        except Failed as error:
            left_out[worker.entry.label] = str(error)
    return able


def take_turn(worker: Worker, steps: int) -> None:
    """Take one step untimed, because another worker has filled the caches since, and `steps` timed ones."""
    worker.times += worker.ask(do="step", n=steps + 1)["ms"][1:]


# ------------------------------------------------------------------------------------------------------------ result


def figures(workers: list[Worker]) -> dict[str, Any]:
    median = {worker.entry.label: statistics.median(worker.times) for worker in workers}
    floors = [worker.entry.label for worker in workers if worker.entry.is_floor]
    systems = [worker.entry for worker in workers if not worker.entry.is_floor]
    ours = [entry for entry in systems if entry.system == "ours"]
    return {
        "systems": {
            worker.entry.label: {
                "median_ms": round(median[worker.entry.label], 3),
                "l0": rounded(worker.about["l0"]),
                "peak_mib": rounded(worker.about["peak_mib"]),
                "version": worker.about["version"],
                "torch": worker.about["torch"],
                "python": worker.about["python"],
                "gpu": worker.about["gpu"],
                "config": worker.entry.config,
                "dead_share": worker.entry.dead_share,
                "times_ms": [round(time, 3) for time in worker.times],
            }
            for worker in workers
        },
        "ratio_to_floor": {
            entry.label: {floor: round(median[entry.label] / median[floor], 3) for floor in floors} for entry in systems
        },
        "ratio_peer_to_ours": {
            mine.label: {
                entry.label: round(median[entry.label] / median[mine.label], 2)
                for entry in systems
                if entry.system != "ours" and entry.family == mine.family
            }
            for mine in ours
        },
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return machine_facts() | {"threads": arguments.threads, "device": arguments.device}


def rounds(arguments: argparse.Namespace) -> dict[str, int]:
    return {"rounds": arguments.rounds, "steps_per_round": arguments.steps}


def table(result: dict[str, Any]) -> list[str]:
    width = longest(result["systems"])
    lines = [f"{'':{width}}{'ms':>10}{'/ encoder f32':>15}{'/ ours':>9}{'L0':>8}{'peak MiB':>10}"]
    for label, row in result["systems"].items():
        encoder = result["ratio_to_floor"].get(label, {}).get("floor/encoder-float32")
        to_ours = next((r[label] for r in result["ratio_peer_to_ours"].values() if label in r), None)
        lines.append(
            f"{label:{width}}{row['median_ms']:>10.2f}{shown(encoder, 3):>15}{shown(to_ours, 2):>9}"
            f"{shown(row['l0'], 1):>8}{shown(row['peak_mib'], 0):>10}"
        )
    return lines


def sweep_table(points: list[dict[str, Any]]) -> list[str]:
    """Lines for each system at each size, with its growth, and the encoder matmul's, since its first size."""
    labels = list(dict.fromkeys(label for point in points for label in point["systems"]))
    width = longest(labels)
    sizes = f"{'d_sae':>8}{'k':>5}{'L0':>8}"
    lines = [f"{'':{width}}{sizes}{'ms':>10}{'/ encoder f32':>15}{'grown':>9}{'encoder grown':>15}{'peak MiB':>10}"]
    for label in labels:
        first: tuple[float, float] | None = None
        for point in points:
            start = f"{label:{width}}{point['sizes']['d_sae']:>8}{point['sizes']['k']:>5}"
            if label in point["left_out"]:
                lines.append(f"{start}  left out: {point['left_out'][label]}")
                continue
            row, encoder = point["systems"][label], point["systems"].get("floor/encoder-float32")
            ms, encoder_ms = row["median_ms"], encoder["median_ms"] if encoder else float("nan")
            first = first or (ms, encoder_ms)
            lines.append(
                f"{start}{shown(row['l0'], 1):>8}{ms:>10.2f}"
                f"{ms / encoder_ms:>15.3f}{ms / first[0]:>9.2f}{encoder_ms / first[1]:>15.2f}"
                f"{shown(row['peak_mib'], 0):>10}"
            )
    for point in points:
        never_timed = {name: reason for name, reason in point["left_out"].items() if name not in labels}
        lines += [f"left out at d_sae {point['sizes']['d_sae']}: {name}: {r}" for name, r in never_timed.items()]
    return lines


def longest(labels: Iterable[str]) -> int:
    return max(map(len, labels), default=0)


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    with without_traceback("What it has printed is complete; the same command begins anew."):
        main()
