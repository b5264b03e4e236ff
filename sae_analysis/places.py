"""Where analyses lie: beside the run that an autoencoder is of, or in a folder of its name."""

from __future__ import annotations

from pathlib import Path

from sae_training.formats.found import ENDINGS, without_ending
from sae_training.machine.run_files import CHECKPOINTS, FINAL, SNAPSHOTS
from sae_training.run.folder import is_run_folder

ANALYSIS_FOLDER = "analysis"
STORE_FILE = "analysis.sqlite"


def name_of(path: Path) -> str:
    """Return the name of an autoencoder: that of its folder, of the run for a run's last one, or of the file.

    A file loses the endings of its format: a.b-0.01.pkl.gz is a.b-0.01.
    """
    path = path.resolve()
    if path.name == FINAL and is_run_folder(path.parent):
        return path.parent.name
    return without_ending(path) if path.is_file() else path.name


def folder_of(path: Path) -> Path:
    """Return the folder of the run that a path is, or lies in; for any other file `runs/<its name>`."""
    path = path.resolve()
    if is_run_folder(path):
        return path
    for parent in path.parents[:2]:  # final/, checkpoints/step_1/, snapshots/step_1/
        inside = path.relative_to(parent).parts[0]
        if inside in (CHECKPOINTS, SNAPSHOTS, FINAL) and is_run_folder(parent):
            return parent if inside == FINAL else parent / "analysis-of" / path.name
    return Path("runs") / name_of(path)


def store_of(path: Path) -> Path | None:
    """Return the store that a path is, that it holds, or that `build` wrote for the autoencoder there; None if none."""
    places = (
        path,
        path / ANALYSIS_FOLDER / STORE_FILE,
        path / STORE_FILE,
        folder_of(path) / ANALYSIS_FOLDER / STORE_FILE,
    )
    return next((p for p in places if p.is_file() and (p != path or not path.name.endswith(ENDINGS))), None)
