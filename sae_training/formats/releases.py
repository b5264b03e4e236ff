"""What is known of published autoencoders though their files do not say it: `releases.json`, each fact with its source.

An entry holds for files of one format (`format`, how their file_format begins) at certain paths: below a folder with
the repository's name (`repository`, owner/name, a regular expression), also as the hub's cache has it
(models--owner--name), and with a path from there that fits `below`. Without `repository`, the end of the path must fit.
In a text of `facts`, {layer} and the like are groups of the two expressions; a table is looked up by the layer.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("releases.json")

OVERRIDES = ("model_processing", "normalize_activations")
"""Fields in which a release's files are known to be wrong, so that a fact replaces what they say."""


@dataclass(frozen=True)
class Release:
    format: str
    repository: str | None
    below: str
    facts: dict[str, Any]
    source: str


@functools.cache
def releases() -> tuple[Release, ...]:
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Release(**{"repository": None, "below": ".*", **entry}) for entry in entries)


def facts_of(path: Path, file_format: str) -> dict[str, Any]:
    """What is known of the file or folder at `path`, by config fields and `norm_factor`; {} for most."""
    found: dict[str, Any] = {}
    for release in releases():
        if file_format.startswith(release.format) and (groups := groups_of(release, path)) is not None:
            found |= {
                name: value for name, fact in release.facts.items() if (value := filled(fact, groups)) is not None
            }
    return found | ({"k": int(found["k"])} if "k" in found else {})


def groups_of(release: Release, path: Path) -> dict[str, str] | None:
    """The groups of the expressions that a path fits; None if it does not fit."""
    for groups, rest in starts(release, path.absolute()):
        if matched := re.fullmatch(release.below, rest):
            return groups | matched.groupdict()
    return None


def starts(release: Release, path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Where `below` may begin: the groups of the repository, and the path from there."""
    parts = path.parts
    if release.repository is None:
        yield from (({}, "/".join(parts[i:])) for i in range(1, len(parts)))
        return
    owner, _, name = release.repository.partition("/")
    for i, part in enumerate(parts):
        if matched := re.fullmatch(f"(?:models--{owner}--)?{name}", part):
            rest = parts[i + 3 :] if parts[i + 1 : i + 2] == ("snapshots",) else parts[i + 1 :]
            yield matched.groupdict(), "/".join(rest)


def filled(fact: Any, groups: dict[str, str]) -> Any:
    """A fact with the groups in it; None where a table has no row for this layer."""
    if isinstance(fact, dict):
        return fact.get(groups.get("layer", ""))
    return fact.format_map(groups) if isinstance(fact, str) else fact
