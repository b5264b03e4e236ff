"""What all processes of a job must have alike: the config, the code, the text. A difference names the rank."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sae_training.parallel.ranks import n_ranks, of_all

PACKAGE = Path(__file__).parents[1]

SOURCES = (".py", ".cpp", ".js", ".css", ".j2", ".json")


def check_alike(facts: Mapping[str, object]) -> None:
    """Raise ValueError, on every rank alike, if one of the facts differs from that of the first rank."""
    if n_ranks() == 1:
        return
    everyones = of_all((socket.gethostname(), {name: repr(value) for name, value in facts.items()}))
    (_, first), *others = everyones
    for number, (host, theirs) in enumerate(others, 1):
        different = [name for name in first if theirs.get(name) != first[name]]
        if different:
            pairs = [f"  {name}: rank 0 has {first[name]}, rank {number} {theirs.get(name)}" for name in different]
            raise ValueError("\n".join([f"rank {number} ({host}) differs from rank 0; give all the same:", *pairs]))


@cache
def code(*others: Path) -> str:
    """Return a hash of the source files of this package and of `others`, by their folders: any change makes another."""
    digest = hashlib.sha256()
    for package in (PACKAGE, *others):
        for path in sorted(path for path in package.rglob("*") if path.suffix in SOURCES):
            digest.update(path.relative_to(package.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
