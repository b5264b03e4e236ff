"""The texts of tokens, read often: contexts are kept, and most tokens are text by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

from sae_analysis.pieces import as_texts
from sae_analysis.store.read import Reader

REACH = 3
"""A character has four bytes at most, so it reaches over this many tokens beyond one."""
LONGEST = 200
"""Letters of one token that are shown."""


class Texts:
    """The texts of the contexts and tokens of an analysis."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ids = lru_cache(maxsize=50_000)(self.read_ids)

    def read_ids(self, context: int) -> list[int]:
        return self.reader.context(context).tolist()

    @cached_property
    def alone(self) -> list[str | None]:
        """The text of each token by itself; None if it holds a part of a character."""
        return [decoded(piece) for piece in self.reader.pieces]

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token of a sequence; "" for padding.

        Parts of characters stand together, because a token that is text by itself neither ends nor begins inside one.
        """
        pieces, alone = self.reader.pieces, self.alone
        found = [alone[id_] if 0 <= id_ < len(pieces) else "" for id_ in ids]
        while None in found:
            start = found.index(None)
            stop = next((i for i in range(start, len(found)) if found[i] is not None), len(found))
            found[start:stop] = as_texts([pieces[id_] for id_ in ids[start:stop]])
        return [text for text in found if text is not None]

    def token(self, id_: int) -> str:
        return self.of([id_])[0]

    def window(self, context: int, start: int, stop: int) -> list[str]:
        """Return the texts of some tokens of a context. A character that is split at an end stays whole."""
        ids = self.ids(context)
        before = min(REACH, start)
        return self.of(ids[start - before : stop + REACH])[before : before + stop - start]


def decoded(piece: bytes) -> str | None:
    """Return the text of a token, or None if its bytes are no text by themselves."""
    try:
        return shortened(piece.decode())
    except UnicodeDecodeError:
        return None


def shortened(text: str) -> str:
    """Return a text of one token without what is beyond LONGEST letters, because no page shows more of it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} letters)"


def window_of(position: int, length: int, width: int = 32) -> range:
    """Return the positions of `width` tokens around one, two thirds of them before it."""
    start = max(0, min(position - 2 * width // 3, length - width))
    return range(start, min(start + width, length))
