"""Every notebook in tutorials/ runs from top to bottom, in a folder of its own and at a small size.

A cell tagged `parameters` holds a notebook's sizes; the tests set the names in PARAMETERS after it. CHECKS holds what
must be true of a notebook's variables at its end. `tests/notebooks.py` stores a notebook with its outputs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from notebooks import PAGE, PLOT, ROOT, read, run_notebook

NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PARAMETERS = {"TOKENS": 24_576, "ANALYSIS_TOKENS": 8_192, "WORD": "the"}  # 24 steps; 64 contexts
MOST_BYTES = 1_500_000  # of a notebook with its outputs


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
    run_notebook(notebook, folder, threads=1)
    return json.loads(notebook.cells[-1].outputs[-1].text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_small_and_of_no_machine(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < MOST_BYTES
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    numbers = [cell.execution_count for cell in cells]
    assert numbers in ([None] * len(cells), list(range(1, len(cells) + 1)))
    outputs = [output for cell in cells for output in cell.outputs]
    assert bool(outputs) == (numbers[0] is not None)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [output for output in outputs if PLOT in output.get("data", {})]  # a picture has its place
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [text for text in texts if re.search(r"(?<![\w.])/(tmp|home|root|work|Users)/", text)]
    assert not [output for output in outputs if "<iframe" in output.get("data", {}).get(PAGE, "")]


def run_checks(values: dict[str, Any]) -> None:
    """Of training_and_loading after 24 steps, where the mean activation alone would explain 0."""
    evaluation = values["evaluation"]
    assert values["l0"] == pytest.approx(16) == evaluation["metrics/eval_l0"]
    assert values["explained_variance"] == pytest.approx(evaluation["metrics/eval_explained_variance"], abs=1e-4)
    assert 0.2 < values["explained_variance"] < 1
    assert 0.5 < evaluation["metrics/CE_loss_score"] < 1
    assert len(values["chosen"]) > 0
    assert values["change_where_it_fires"] != 0


def evaluating_checks(values: dict[str, Any]) -> None:
    evaluation = values["evaluation"]
    by_hand = {
        "l0": "eval_l0",
        "explained_variance": "eval_explained_variance",
        "clean": "ce_loss_without_sae",
        "spliced": "ce_loss_with_sae",
        "ablated": "ce_loss_with_ablation",
        "ce_score": "CE_loss_score",
    }
    for name, key in by_hand.items():
        assert values[name] == pytest.approx(evaluation[f"metrics/{key}"], rel=2e-3), name
    assert values["clean"] < values["spliced"] < values["ablated"]
    assert values["n_silent"] >= 0 and len(values["chosen"]) == 5


def exploring_checks(values: dict[str, Any]) -> None:
    assert values["unchanged"] is True
    assert any(change != 0 for change in values["changes"].values())
    rises = list(values["differences"].values())
    assert rises[0] < rises[1]
    assert values["best"] > 0 and values["strength"] > 0


def loading_checks(values: dict[str, Any]) -> None:
    """Four files are the function of the original; the others are as good as a threshold allows after 24 steps."""
    same = [found["largest difference"] < 1e-3 for found in values["table"].values()]
    assert (len(same), sum(same)) == (10, 4)
    assert all(0 < found["active latents"] < 300 for found in values["table"].values())
    assert "give k=" in values["message"]
    assert values["losses"]["sparsify"] == pytest.approx(values["losses"]["the original"], rel=1e-3, abs=1e-4)


CHECKS = {
    "evaluating_your_sae": (
        ["evaluation", "l0", "explained_variance", "clean", "spliced", "ablated", "ce_score", "n_silent", "chosen"],
        evaluating_checks,
    ),
    "exploring_latents": (["unchanged", "changes", "differences", "best", "strength"], exploring_checks),
    "loading_other_peoples_saes": (["table", "message", "losses"], loading_checks),
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
