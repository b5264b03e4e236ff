"""Paths of the small language model and the texts that come with the package, and their names."""

from __future__ import annotations

from pathlib import Path

_DEMO_DATA = Path(__file__).parent

DEMO_MODEL = _DEMO_DATA / "model"
DEMO_TEXT = _DEMO_DATA / "text" / "train.jsonl.gz"
DEMO_HELD_OUT_TEXT = _DEMO_DATA / "text" / "held_out.jsonl.gz"


def bundled_model(name: str) -> str:
    """The folder of the bundled model for "demo"; any other name unchanged. A folder called demo is given as "./demo".

    Raises FileNotFoundError if the package was installed without the model.
    """
    return _bundled(name, {"demo": DEMO_MODEL})


def bundled_text(name: str) -> str:
    """The file of a bundled text for "demo" and "demo-held-out"; otherwise as `bundled_model`."""
    return _bundled(name, {"demo": DEMO_TEXT, "demo-held-out": DEMO_HELD_OUT_TEXT})


def _bundled(name: str, paths: dict[str, Path]) -> str:
    path = paths.get(name)
    if path is None:
        return name
    if not path.exists():
        raise FileNotFoundError(f"{name!r}: {path} is missing from the installed package; install sae-training again")
    return str(path)
