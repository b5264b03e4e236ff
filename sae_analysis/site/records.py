"""What the page of a latent shows, as a value of JSON."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sqlalchemy import Row, Table, select

from sae_analysis.site.scripts import short, shorts
from sae_analysis.site.texts import ShownTexts, window_of
from sae_analysis.store import schema
from sae_analysis.store.example_blob import KINDS, Stored, from_bytes
from sae_analysis.store.read import Reader

SEPARATOR = "\x7f"
"""Between the tokens of a text: one byte of JSON, where a list has three for each token."""
SLICE = 256


class Records:
    """Makes the records of latents. `has_context` says whether the site holds the whole text of a context."""

    def __init__(self, reader: Reader, has_context: Callable[[int], bool] = lambda context: False) -> None:
        self.reader, self.has_context = reader, has_context
        self.texts = ShownTexts(reader)
        self.figures = reader.latents()
        self.columns = [name for name in self.figures.columns if name != "index"]
        self.values = self.figures[self.columns].astype(float).to_numpy()
        """(latents, columns)"""

    def all(self) -> Iterator[dict[str, Any]]:
        """Yield the records of all latents, in order."""
        for start in range(0, len(self.values), SLICE):
            yield from self.some(range(start, min(start + SLICE, len(self.values))))

    def one(self, latent: int) -> dict[str, Any]:
        return next(iter(self.some(range(latent, latent + 1))))

    def some(self, latents: range) -> Iterator[dict[str, Any]]:
        details = {row.latent: json.loads(zlib.decompress(row.content)) for row in self.rows(schema.details, latents)}
        examples = {row.latent: from_bytes(row.content) for row in self.rows(schema.examples, latents)}
        effects = {row.latent: json.loads(zlib.decompress(row.content)) for row in self.rows(schema.effects, latents)}
        tokens: dict[int, list[Any]] = {}
        for row in self.rows(schema.tokens, latents):
            tokens.setdefault(row.latent, []).append((row.rank, row.token, row.share))
        for latent in latents:
            record = self.record(latent, details.get(latent, {}), sorted(tokens.get(latent, [])), examples[latent])
            yield record | {"effects": [self.effect(one) for one in effects.get(latent, [])]}

    def rows(self, table: Table, latents: range) -> list[Row[Any]]:
        """Return the rows of some latents."""
        where = (table.c.analysis == self.reader.analysis, table.c.latent.between(latents.start, latents.stop - 1))
        return self.reader.rows(select(table).where(*where))

    def record(self, latent: int, details: dict[str, Any], tokens: list[Any], examples: Stored) -> dict[str, Any]:
        figures = dict(zip(self.columns, self.values[latent].tolist(), strict=True))
        found: dict[str, Any] = {
            "latent": latent,
            "figures": {name: short(value, 5) for name, value in figures.items() if name not in TOKEN_COLUMNS},
            "tokens": [[self.texts.token(id_), short(share, 3)] for _, id_, share in tokens],
            "examples": self.examples(examples),
        }
        if figures["top_bigram_share"] > 0:
            pair = [int(figures["top_bigram_first"]), int(figures["top_bigram_second"])]
            found["bigram"] = [*(self.texts.token(id_) for id_ in pair), short(figures["top_bigram_share"], 3)]
        if details:
            histogram = details["histogram"]
            found["histogram"] = {"counts": histogram["counts"], "edges": shorts(histogram["edges"])}
            found["quantiles"] = [[float(q), short(v)] for q, v in details["quantiles"].items() if v is not None]
            found["neighbours"] = {name: self.near(name, pairs) for name, pairs in details["neighbours"].items()}
            if "logits" in details:
                found["logits"] = self.logits(details["logits"])
        return found

    def logits(self, details: dict[str, Any]) -> dict[str, Any]:
        sides = {side: [[self.texts.token(i), short(v, 3)] for i, v in details[side]] for side in ("top", "bottom")}
        return sides | {"counts": details["counts"], "edges": shorts(details["edges"])}

    def effect(self, found: dict[str, Any]) -> list[Any]:
        """Return [change of loss, raised tokens, lowered tokens] of one top example, without the latent there."""
        sides = [[[self.texts.token(i), short(v, 3)] for i, v in found[side]] for side in ("raised", "lowered")]
        return [short(found["loss"], 3), *sides]

    def near(self, name: str, pairs: list[tuple[int, float]]) -> list[list[Any]]:
        """Return (number, value) and, for latents, the token that makes up most of their activation."""
        if name == "neurons":
            return [[i, short(value, 3)] for i, value in pairs]
        return [[i, short(value, 3), self.top_token(i)] for i, value in pairs]

    def top_token(self, latent: int) -> str:
        id_ = self.values[latent, self.columns.index("top_token")]
        return self.texts.token(int(id_)) if id_ >= 0 else ""

    def examples(self, stored: Stored) -> list[list[Any]]:
        """Return [kind, context, position, has_context, start, texts, firings] for each example.

        kind: a place in KINDS. start: of the window in the context. texts: of its tokens, with SEPARATOR between them.
        firings: position in the context, activation, position, activation, ...
        """
        found = []
        ends = np.cumsum(stored.lengths).tolist()
        places, values = stored.firing_positions.tolist(), stored.firing_values.tolist()
        lengths = stored.lengths.tolist()
        columns = (stored.kinds.tolist(), stored.contexts.tolist(), stored.positions.tolist(), ends, lengths)
        for kind, context, position, end, length in zip(*columns, strict=True):
            window = window_of(position, len(self.texts.ids(context)))
            texts = self.texts.window(context, window.start, window.stop)
            firings: list[float | int | None] = []
            for i in range(end - length, end):
                firings += [places[i], short(values[i], 3)]
            has_context = int(self.has_context(context))
            found.append([kind, context, position, has_context, window.start, joined(texts), firings])
        return found


TOKEN_COLUMNS = ("top_token", "top_bigram_first", "top_bigram_second")


def joined(texts: list[str]) -> str:
    """Return texts as one, with SEPARATOR between them. One that holds it is shown with the picture of it."""
    if any(SEPARATOR in text for text in texts):
        texts = [text.replace(SEPARATOR, "\u2421") for text in texts]
    return SEPARATOR.join(texts)


def tokens_of_windows(record: dict[str, Any], kind: str = "top") -> Iterator[tuple[list[str], int]]:
    """Yield the texts of the window of each example of a kind, and the place of the example's token among them."""
    for found in record["examples"]:
        if KINDS[found[0]] == kind:
            yield found[5].split(SEPARATOR), found[2] - found[4]
