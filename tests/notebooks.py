"""Notebooks of tutorials/: run one, and store it with its outputs.

python tests/notebooks.py FOLDER tutorials/exploring_latents.ipynb

runs it in FOLDER/tutorials, where ../runs may hold the run of `make demo`, and writes its outputs into the file. Plots
and pages become pictures, which GitHub shows too and which are small; what is said of progress is left out. It needs
Chromium.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from chromium import Browser, browser
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PLOT, PAGE, PICTURE = "application/vnd.plotly.v1+json", "text/html", "image/png"
WIDTH = 960  # pixels of a picture
PAGE_HEIGHT = 1400


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run_notebook(notebook: Any, folder: Path, threads: int | None = None, timeout: int = 300) -> None:
    """Run all cells in `folder`. Raises if one does."""
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    own = {"PYTHONPATH": str(ROOT)} | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    client.execute(env=os.environ | own)


def store_outputs(path: Path, folder: Path) -> None:
    notebook = read(path)
    (here := folder / "tutorials").mkdir(parents=True, exist_ok=True)
    run_notebook(notebook, here, timeout=1200)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, browser(Path(name) / "profile") as one:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [small(output, one, Path(name)) for output in cell.outputs if not is_progress(output)]
                cell.outputs = joined(cell.outputs)
                for output in cell.outputs:
                    if output.output_type == "stream":
                        output.text = output.text.replace(str(folder.resolve()), "..")
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def joined(outputs: list[Any]) -> list[Any]:
    """The outputs with what was printed in several parts as one."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def is_progress(output: Any) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def small(output: Any, one: Browser, folder: Path) -> Any:
    """The output with a picture in place of what only a running notebook shows."""
    if output.output_type not in ("display_data", "execute_result"):
        return output
    data = output.data
    if PLOT in data:
        data = {PICTURE: picture(plot_page(data[PLOT]), one, folder, int(data[PLOT]["layout"].get("height", 450)))}
    elif found := re.match(r'<iframe title="latent.*? srcdoc="(.*?)"', "".join(data.get(PAGE, "")), re.S):
        data = {"text/plain": data["text/plain"], PICTURE: picture(html.unescape(found[1]), one, folder, PAGE_HEIGHT)}
    output.data = data
    output.metadata = {}
    return output


def plot_page(figure: dict[str, Any]) -> str:
    import plotly.io

    figure["layout"]["width"] = WIDTH
    shown = plotly.io.from_json(json.dumps(figure), skip_invalid=True)
    return plotly.io.to_html(shown, config={"displayModeBar": False}).replace("<body>", '<body style="margin: 0">')


def picture(page: str, one: Browser, folder: Path, height: int) -> str:
    """A screenshot of a page, in base64."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    one.size(WIDTH, height)
    one.colours("light")
    one.open(file.as_uri())
    one.js("new Promise((done) => setTimeout(done, 500))")  # until plots are drawn
    return base64.b64encode(one.picture(folder / "page.png").read_bytes()).decode()


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        store_outputs(Path(argument), Path(sys.argv[1]))
