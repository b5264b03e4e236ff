"""Write a static site of an analysis: index.html, one script, one style, and data as script files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sae_analysis.site.contexts import ContextFiles
from sae_analysis.site.one_page import script, site_page, style
from sae_analysis.site.order import clarity, default_order
from sae_analysis.site.overview import COLUMNS, ROW_FIGURES, histograms, row
from sae_analysis.site.records import Records
from sae_analysis.site.scripts import as_json, packed, write_data
from sae_analysis.site.search_index import SearchIndexes
from sae_analysis.store.example_blob import KINDS
from sae_analysis.store.read import Reader
from sae_training.machine.phases import progress_bar

LATENTS_BYTES = 100_000  # of a file of latents, so that a page and the first of its data stay below 300 KB
ROWS_PER_FILE = 4  # a page of a sorted list needs 50 of these files, of a kilobyte each
N_FIRST = 50  # rows of the list that come with the first page


class Analysed(Protocol):
    """What `sae_analysis.open_analysis` returns."""

    reader: Reader


def export_site(analysis: Analysed, out: str | Path) -> Path:
    """Write a static site of an analysis to the folder `out`, and return the path of its index.html.

    It opens from the file system or from any static host, and needs nothing from elsewhere. A site that is there is
    replaced once the new one is complete. ValueError if `out` holds something else.
    """
    with replaced(Path(out).expanduser()) as folder:
        Export(analysis.reader, folder).write()
    return Path(out).expanduser() / "index.html"


class Export:
    """One export: the files of latents are written as they are read, and what sums them up at the end."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.contexts = ContextFiles(reader)
        self.records = Records(reader, self.contexts.are_held.__contains__)
        self.latent_files = LatentFiles(folder)

    def write(self) -> None:
        rows, judged, indexes = [], [], SearchIndexes()
        n = len(self.records.values)
        with progress_bar("writing the site", n, "latents") as bar:
            for record in self.records.all():
                self.latent_files.add(record)
                rows.append(row(record))
                judged.append(clarity(record))
                indexes.add(record)
                bar.update(1)
        self.latent_files.end()
        order = default_order(judged)
        rows = [rows[latent] for latent in order]
        for start in range(0, n, ROWS_PER_FILE):
            write_data(self.folder, f"rows/{start // ROWS_PER_FILE}", rows[start : start + ROWS_PER_FILE])
        indexes.write(self.folder)
        self.write_columns(order)
        write_data(self.folder, "about", self.about() | {"first": rows[:N_FIRST]})
        (self.folder / "site.js").write_text(script(), encoding="utf-8")
        (self.folder / "style.css").write_text(style(), encoding="utf-8")
        (self.folder / "index.html").write_text(site_page(str(self.reader.about["name"])), encoding="utf-8")

    def about(self) -> dict[str, Any]:
        """Return what every page of the site needs."""
        figures = self.records.figures
        has = [name for name in COLUMNS if not np.isnan(self.column(name)).all()]
        return {
            "about": self.reader.about,
            "kinds": KINDS,
            "n_latents": len(figures),
            "n_dead": int(np.count_nonzero(figures["count"].to_numpy() == 0)),
            "columns": has,
            "row_figures": ROW_FIGURES,
            "rows_per_file": ROWS_PER_FILE,
            "latent_files": self.latent_files.counts,
            "context_files": self.contexts.write(self.folder),
            "histograms": histograms(figures),
        }

    def write_columns(self, order: list[int]) -> None:
        """Write figures in the default order, so that a list that is filtered needs no other file to be in it."""
        for name in COLUMNS:
            write_data(self.folder, f"columns/{name}", packed(self.column(name)[order], "<f4"))
        write_data(self.folder, "columns/order", packed(np.array(order), "<u2" if len(order) <= 1 << 16 else "<u4"))

    def column(self, name: str) -> np.ndarray:
        """Return a figure of all latents; NaN where there is none."""
        return self.records.values[:, self.records.columns.index(name)]


class LatentFiles:
    """Writes records of latents in files of about the same size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: list[int] = []
        """Latents in each file; shorter to write than their numbers."""
        self.content: list[dict[str, Any]] = []
        self.n_bytes = 0

    def add(self, record: dict[str, Any]) -> None:
        n_bytes = len(as_json(record).encode())
        if self.content and self.n_bytes + n_bytes > LATENTS_BYTES:
            self.end()
        self.content.append(record)
        self.n_bytes += n_bytes

    def end(self) -> None:
        if self.content:
            write_data(self.folder, f"latents/{len(self.counts)}", self.content)
            self.counts.append(len(self.content))
        self.content, self.n_bytes = [], 0


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of the site `out` if no error ends the writing."""
    if out.exists() and not is_site(out):
        raise ValueError(f"{out}: found a folder with other files, expected none or an earlier site; name another.")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_site(folder: Path) -> bool:
    """Return whether a folder is empty, or a site that `export_site` wrote."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / "data" / "about.js").is_file())
