"""Fuzz every reader of files: change bytes and values of reference files, and see that errors are those of files.

    python scripts/fuzz_formats.py --minutes 10

Each input is a reference file with a few changes, made by hypothesis, which also makes a failing one small. It fails if
anything but ValueError or OSError with the path is raised, if it takes over 20 seconds, or over 4 GB of address space.
Prints one JSON object: inputs, how many loaded, how many were refused, and what failed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sae_training.formats.inspection import in_json, in_words, inspect
from sae_training.machine.interrupt import without_traceback
from sae_training.sparse_autoencoder import Crosscoder, SparseAutoencoder

TESTS = Path(__file__).resolve().parents[1] / "tests"
SEEDS = sorted(path.parent for path in TESTS.glob("reference_*/*/expected.json"))
SECONDS, BYTES = 20, 4 * 2**30

NUMBERS = [b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x00" * 8, b"\x80\x04", b"(", b"R.", b"}", b"[", b'"']
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    10**30,
    0.5,
    1e308,
    "",
    "none",
    "topk",
    [],
    [0],
    [[]],
    {},
    {"a": 1},
]

LINES = [
    b"a: &a [*a, *a]",
    b"!!python/name:os.system",
    b"? [a]",
    b"- - - -",
    b"---",
    b"<<: {a: 1}",
    b"a: " + b"[" * 50,
    b"a: 1:59:59",
]
"""Of YAML."""

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("early"), st.integers(0, 3000), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("put"), st.floats(0, 1), st.sampled_from(NUMBERS)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 400)),
        st.tuples(st.just("truncate"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("value"), st.floats(0, 1), st.sampled_from(VALUES)),
        st.tuples(st.just("drop"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("line"), st.floats(0, 1), st.sampled_from(LINES)),
    ),
    min_size=1,
    max_size=4,
)


def sources() -> list[tuple[Path, str]]:
    """Folders of reference files, and the file in each that is changed."""
    endings = (".json", ".yaml", ".safetensors", ".npz", ".pt", ".pth")
    return [
        (folder, str(path.relative_to(folder)))
        for folder in SEEDS
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(endings) and not path.name.startswith("expected.")
    ]


def changed(content: bytes, changes: list[tuple[str, Any, Any]], is_json: bool) -> bytes:
    for kind, where, what in changes:
        if kind == "line":
            lines = content.split(b"\n")
            lines.insert(int(where * len(lines)), what)
            content = b"\n".join(lines)
            continue
        if kind in ("value", "drop"):
            content = with_value(content, where, what, kind == "drop", is_json)
            continue
        at = where if isinstance(where, int) else int(where * len(content))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ what]) + content[at + 1 :]
        elif kind in ("early", "put"):
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "cut":
            content = content[:at] + content[at + what :]
        elif kind == "truncate":
            content = content[:at]
    return content


def with_value(content: bytes, where: float, value: Any, drop: bool, is_json: bool) -> bytes:
    """Change a value of a JSON file, or of the JSON in the header of a safetensors file, with the right length."""
    try:
        head = content if is_json else content[8 : 8 + int.from_bytes(content[:8], "little")]
        values = json.loads(head)
        place, key = values, None
        for depth in range(3):
            if not isinstance(place, dict) or not place:
                break
            key = list(place)[int(where * 7919 * (depth + 1)) % len(place)]
            if depth == 2 or not isinstance(place[key], dict) or int(where * 1e6) % 3 == depth:
                if drop:
                    del place[key]
                else:
                    place[key] = value
                break
            place = place[key]
        text = json.dumps(values).encode()
    except (ValueError, TypeError, RecursionError):
        return content
    return text if is_json else len(text).to_bytes(8, "little") + text + content[8 + len(head) :]


def too_long(*_: object) -> None:
    raise TimeoutError(f"took over {SECONDS} seconds")


class Fuzz:
    """Counts of what came of the inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outcomes, self.failures = folder, Counter[str](), {}

    def one(self, source: tuple[Path, str], changes: list[tuple[str, Any, Any]], form: str) -> None:
        """Load and inspect one input; AssertionError if it fails."""
        place = self.folder / "sae"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source[0], place, ignore=shutil.ignore_patterns("expected.*"))
        content = changed((place / source[1]).read_bytes(), changes, source[1].endswith(".json"))
        (place / source[1]).write_bytes(content)
        path = place / json.loads((source[0] / "expected.json").read_text()).get("path", "")
        if source[1].endswith((".pt", ".pth")) and form != "folder":
            path = place / f"one{form}"
            path.write_bytes(gzip.compress(content, 1) if form.endswith(".gz") else content)
        signal.alarm(SECONDS)
        try:
            several = source[0].parent.name == "reference_crosscoders"
            load = Crosscoder.load_from_pretrained if several else SparseAutoencoder.load_from_pretrained
            for look in (load, all_of_many, both_prints):
                self.outcomes[self.outcome(look, path)] += 1
        finally:
            signal.alarm(0)

    def outcome(self, look: Any, path: Path) -> str:
        try:
            look(path)
        except (ValueError, OSError) as error:
            if not isinstance(error, TimeoutError) and str(self.folder) in str(error) and len(str(error)) < 5000:
                return "refused"
            self.fail(error)
        except BaseException as error:
            self.fail(error)
        return {all_of_many: "loaded as many", both_prints: "inspected"}.get(look, "loaded")

    def fail(self, error: BaseException) -> None:
        kind = f"{type(error).__name__}: {str(error)[:300]}".replace(str(self.folder), "...")
        self.failures[kind] = self.failures.get(kind, 0) + 1
        raise AssertionError(kind) from error


def all_of_many(path: Path) -> None:
    for one in SparseAutoencoder.load_many(path).values():
        one.encode(torch.zeros(2, one.d_in))


def both_prints(path: Path) -> None:
    told = inspect(path, full=True)
    in_words(told)
    in_json(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, too_long)
    started, rounds, found = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))

        def round_of(number: int) -> None:
            @seed(args.seed + number)
            @settings(
                max_examples=200, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            )  # fmt: skip
            @given(st.sampled_from(sources()), CHANGES, st.sampled_from(["folder", ".pt", ".pkl", ".pkl.gz"]))
            def run(source: tuple[Path, str], changes: list[tuple[str, Any, Any]], form: str) -> None:
                fuzz.one(source, changes, form)

            run()

        while time.monotonic() - started < 60 * args.minutes:
            try:
                round_of(rounds)
            except BaseException as error:  # one failure, or hypothesis' group of several
                found.append("".join(getattr(error, "__notes__", [])) or str(error))
            rounds += 1
        told = {
            "seed": args.seed,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "inputs": sum(fuzz.outcomes.values()) // 3,
            "outcomes": fuzz.outcomes,
            "failures": fuzz.failures,
            "smallest": found,
        }
        print(json.dumps(told, indent=2))
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
