"""Paths of the small language model and text that the package carries, and the names they go by."""

from __future__ import annotations

from pathlib import Path

_DEMO_DATA = Path(__file__).parent

DEMO_MODEL = _DEMO_DATA / "model"
DEMO_TEXT = _DEMO_DATA / "text" / "train.jsonl"
DEMO_HELD_OUT_TEXT = _DEMO_DATA / "text" / "held_out.jsonl"

_MODELS = {"demo": DEMO_MODEL}
_TEXTS = {"demo": DEMO_TEXT, "demo-held-out": DEMO_HELD_OUT_TEXT}


def bundled_model(name: str) -> str:
    """Folder of the model that comes with this package for "demo", any other name as it is.

    The user's own folder of that name is reached as "./demo"; the same holds for texts.
    """
    return _bundled_path(name, _MODELS)


def bundled_text(name: str) -> str:
    """File of the text that comes with it for "demo" and "demo-held-out", else the name as it is."""
    return _bundled_path(name, _TEXTS)


def _bundled_path(name: str, bundled: dict[str, Path]) -> str:
    path = bundled.get(name)
    if path is None:
        return name
    if not path.exists():
        raise FileNotFoundError(f"{name!r}: {path} is missing from the installed package; install sae-training again")
    return str(path)
