"""Reads the pages that reports write."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    @property
    def figures(self) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Traces and layout of each plot, by its title."""
        found = {}
        decoder = json.JSONDecoder()
        for script in self.texts["script"]:
            for call in re.finditer(r'Plotly\.newPlot\(\s*"plot-\d+",\s*', script):
                traces, end = decoder.raw_decode(script, call.end())
                comma = re.compile(r"\s*,\s*").match(script, end)
                assert comma
                layout, _ = decoder.raw_decode(script, comma.end())
                found[layout["title"]["text"]] = (traces, layout)
        return found

    @property
    def table(self) -> dict[str, list[str]]:
        """Cells of each row, by its label."""
        metrics = [text for text in self.texts["th"]]
        n_columns = len(self.texts["td"]) // (n := self._n_rows)
        cells = self.texts["td"]
        rows = [cells[i * n_columns : (i + 1) * n_columns] for i in range(n)]
        return dict(zip(metrics[-n:], rows, strict=True))

    @property
    def _n_rows(self) -> int:
        return sum(tag == "th" and attrs.get("scope") == "row" for tag, attrs in self.tags)
