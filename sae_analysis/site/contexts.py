"""The whole texts of the contexts that examples are in, which a page shows when a reader asks for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select

from sae_analysis.site.records import SLICE, joined
from sae_analysis.site.scripts import write_data
from sae_analysis.site.texts import ShownTexts
from sae_analysis.store import schema
from sae_analysis.store.example_blob import KINDS, from_bytes
from sae_analysis.store.read import Reader

FILE_BYTES = 60_000
MOST_BYTES = 100_000_000
"""Of all such texts. Beyond it a site holds those of the strongest examples, and of others as many as fit."""


class ContextFiles:
    """The contexts that the site will hold, which are known before they are written."""

    def __init__(self, reader: Reader, most_bytes: int = MOST_BYTES) -> None:
        self.reader, self.texts = reader, ShownTexts(reader)
        self.numbers = self.chosen(most_bytes)
        self.are_held = set(self.numbers)

    def chosen(self, most_bytes: int) -> list[int]:
        of_top, of_others = self.used()
        others = sorted(of_others - of_top)
        ordered = [*sorted(of_top), *others]
        if not ordered:
            return []
        some = ordered[:: max(1, len(ordered) // 64)]
        n_bytes = np.mean([len(self.text(number).encode(errors="replace")) + 8 for number in some])
        return sorted(ordered[: int(most_bytes / n_bytes)])

    def used(self) -> tuple[set[int], set[int]]:
        """Return the contexts of the strongest examples, and of all others."""
        of_top: set[int] = set()
        of_others: set[int] = set()
        table, top = schema.examples, KINDS.index("top")
        n = self.reader.about["d_sae"]
        for start in range(0, n, SLICE):
            where = (table.c.analysis == self.reader.analysis, table.c.latent.between(start, start + SLICE - 1))
            for row in self.reader.rows(select(table.c.content).where(*where)):
                stored = from_bytes(row.content)
                of_top.update(stored.contexts[stored.kinds == top].tolist())
                of_others.update(stored.contexts[stored.kinds != top].tolist())
        return of_top, of_others

    def text(self, number: int) -> str:
        return context_text(self.texts, number)

    def write(self, folder: Path) -> list[int]:
        """Write files of contexts, and return the first context of each."""
        firsts: list[int] = []
        content: list[list[Any]] = []
        size = 0
        for number in self.numbers:
            text = self.text(number)
            if content and size + len(text) > FILE_BYTES:
                write_data(folder, f"contexts/{len(firsts)}", content)
                firsts.append(content[0][0])
                content, size = [], 0
            content.append([number, text])
            size += len(text) + 8
        if content:
            write_data(folder, f"contexts/{len(firsts)}", content)
            firsts.append(content[0][0])
        return firsts


def context_text(texts: ShownTexts, number: int) -> str:
    return joined(texts.of(texts.read_ids(number)))
