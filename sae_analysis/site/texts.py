"""The texts of the contexts of an analysis, read often: contexts are kept, and long tokens are shortened."""

from __future__ import annotations

from functools import lru_cache

from sae_analysis.pieces import Texts
from sae_analysis.store.read import Reader

REACH = 3
"""A character has four bytes at most, so it reaches over this many tokens beyond one."""
LONGEST = 200
"""Letters of one token that are shown."""


class ShownTexts:
    """The texts of the contexts and tokens of an analysis."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.of = Texts(reader.pieces, shortened).of
        self.ids = lru_cache(maxsize=50_000)(self.read_ids)

    def read_ids(self, context: int) -> list[int]:
        return self.reader.context(context).tolist()

    def token(self, id_: int) -> str:
        return self.of([id_])[0]

    def window(self, context: int, start: int, stop: int) -> list[str]:
        """Return the texts of some tokens of a context. A character that is split at an end stays whole."""
        ids = self.ids(context)
        before = min(REACH, start)
        return self.of(ids[start - before : stop + REACH])[before : before + stop - start]


def shortened(text: str) -> str:
    """Return a text of one token without what is beyond LONGEST letters, because no page shows more of it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} letters)"


def window_of(position: int, length: int, width: int = 32) -> range:
    """Return the positions of `width` tokens around one, two thirds of them before it."""
    start = max(0, min(position - 2 * width // 3, length - width))
    return range(start, min(start + width, length))
