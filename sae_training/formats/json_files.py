"""JSON files of other programs: read if they are small, plain and unambiguous."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MOST_BYTES = 16 * 2**20  # of a config; the largest seen in the field has 30 KB


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. ValueError for anything else, for repeated keys, and for numbers that are none."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: found {size:,} bytes, expected a config of at most {MOST_BYTES:,}; check the file.")
    return parse_object(path.read_bytes(), str(path))


def read_above(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The object in a file of a folder above, which may be another program's: {} and a remark if it is unreadable."""
    try:
        return read_object(path), ()
    except (ValueError, OSError) as error:
        return {}, (f"a file above is left out, as if it were not there: {error}",)


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """The object that a text of JSON describes; `where` begins the message of the ValueError."""
    try:
        value = json.loads(
            text, object_pairs_hook=without_repeats, parse_constant=not_a_number, parse_float=finite_number
        )
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a config; check the file.") from None
    except AmbiguousJson as error:
        raise ValueError(f"{where}: {error}; correct the file.") from error
    except ValueError as error:  # also text that is not UTF-8, and whole numbers of thousands of digits
        raise ValueError(f"{where}: no readable JSON ({error}); use another copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a {type(value).__name__}, expected an object of names and values.")
    return value


class AmbiguousJson(ValueError):
    """A text that other programs would read otherwise."""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise AmbiguousJson(f"{repeated[:80]!r} is given more than once")
    return values


def not_a_number(text: str) -> float:
    raise AmbiguousJson(f"found {text}, expected a finite number")


def finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else not_a_number(text)  # 1e999
