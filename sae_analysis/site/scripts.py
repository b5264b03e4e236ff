"""Data as script files: pages opened from the file system may run scripts, but not read files.

A file calls `site.put(name, value)`; the page asks for it by its name when it needs it.
"""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")
"""What a script may not hold as it is: the start of a tag, ends of lines, and halves of characters."""


def as_json(value: Any) -> str:
    """Return JSON that any script or HTML script element may hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def as_script(name: str, value: Any) -> str:
    return f"site.put({as_json(name)},{as_json(value)});"


def write_data(folder: Path, name: str, value: Any) -> int:
    """Write folder/data/<name>.js, and return its size in bytes."""
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = as_script(name, value).encode()
    path.write_bytes(content)
    return len(content)


def packed(values: np.ndarray, kind: str) -> str:
    """Return base64 of little-endian numbers of a kind ("<f4", "<u4")."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def short(value: float | None, digits: int = 4) -> float | int | None:
    """Return a number with few digits, because a page shows no more and JSON writes them all."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.{digits}g}")


def shorts(values: Any, digits: int = 4) -> list[float | int | None]:
    return [short(float(value), digits) for value in values]
