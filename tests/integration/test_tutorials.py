"""Every notebook in tutorials/ runs from top to bottom, in a folder of its own and at a small size.

A cell tagged `parameters` holds a notebook's sizes; the tests set the names in PARAMETERS after it. CHECKS holds what
must be true of a notebook's variables at its end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PARAMETERS = {"TOKENS": 24_576}  # 24 steps of the training notebook


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def is_parameters(cell: Any) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def execute(path: Path, folder: Path, wanted: list[str]) -> dict[str, Any]:
    """Run the notebook in `folder`; the values of its variables `wanted` at the end. Raises if a cell does."""
    notebook = read(path)
    (at,) = [i for i, cell in enumerate(notebook.cells) if is_parameters(cell)]
    values = PARAMETERS | {"RUN_DIR": str(folder / "runs")}
    changes = [f"{name} = {value!r}" for name, value in values.items() if f"{name} = " in notebook.cells[at].source]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(changes)))
    report = f"import json\nprint(json.dumps({{name: globals()[name] for name in {wanted}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(report))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return json.loads(notebook.cells[-1].outputs[-1].text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []
    assert notebook.metadata.kernelspec.name == "python3"


def run_checks(values: dict[str, Any]) -> None:
    """Of training_and_loading after 24 steps, where the mean activation alone would explain 0."""
    evaluation = values["evaluation"]
    assert values["l0"] == pytest.approx(16) == evaluation["metrics/eval_l0"]
    assert values["explained_variance"] == pytest.approx(evaluation["metrics/eval_explained_variance"], abs=1e-4)
    assert 0.2 < values["explained_variance"] < 1
    assert 0.5 < evaluation["metrics/CE_loss_score"] < 1
    assert len(values["chosen"]) > 0
    assert values["change_where_it_fires"] != 0


CHECKS = {
    "training_and_loading": (
        ["evaluation", "l0", "explained_variance", "chosen", "change_where_it_fires", "change_elsewhere"],
        run_checks,
    ),
}


def test_every_notebook_has_checks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    wanted, check = CHECKS[path.stem]
    check(execute(path, tmp_path, wanted))
