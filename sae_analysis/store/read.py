"""Reading an analysis back from its tables."""

from __future__ import annotations

import json
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sqlalchemy import Double, Engine, Select, Table, create_engine, event, select
from sqlalchemy.exc import DatabaseError

from sae_analysis.pieces import Texts
from sae_analysis.store import schema
from sae_analysis.store.example_blob import Stored, from_bytes


def engine_of(url: str) -> Engine:
    """Return the engine of a database URL. SQLite writes ahead to a log, so that readers never wait for a writer."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def set_up(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA synchronous=NORMAL")

    return engine


class Reader:
    """Reads the analysis number `analysis` of a database. ValueError if it is unfinished or of another schema."""

    def __init__(self, url: str, analysis: int = 1) -> None:
        self.engine, self.analysis, self.url = engine_of(url), analysis, url
        try:
            (row,) = self.rows(select(schema.analyses).where(schema.analyses.c.analysis == analysis)) or [None]
        except DatabaseError as error:
            raise ValueError(f"{url}: holds no analysis ({str(error.orig)}); build it anew.") from error
        if row is None:
            raise ValueError(f"{url}: holds no analysis number {analysis}.")
        if row.schema_version != schema.SCHEMA_VERSION:
            raise ValueError(
                f"{url}: has schema version {row.schema_version}, but this version of the package reads "
                f"{schema.SCHEMA_VERSION}; build the analysis anew, or read it with the version that built it."
            )
        if not row.complete:
            raise ValueError(f"{url}: this analysis is unfinished; the same `build` command goes on with it.")
        self.about: dict[str, Any] = json.loads(row.about)

    def rows(self, query: Select[*tuple[Any, ...]]) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(query))

    def content(self, table: Table, key: str, number: int) -> bytes | None:
        """Return one value of a table of blobs; None if there is none."""
        found = self.rows(select(table.c.content).where(table.c.analysis == self.analysis, table.c[key] == int(number)))
        return found[0].content if found else None

    @cached_property
    def pieces(self) -> list[bytes]:
        query = select(schema.pieces.c.content).where(schema.pieces.c.analysis == self.analysis)
        return [bytes(row.content) for row in self.rows(query.order_by(schema.pieces.c.token))]

    def texts(self, ids: np.ndarray | list[int]) -> list[str]:
        """Return the text of each token of a sequence; "" for padding."""
        return self.decoder.of(np.asarray(ids).tolist())

    @cached_property
    def decoder(self) -> Texts:
        return Texts(self.pieces)

    def latents(self) -> pd.DataFrame:
        table = schema.latents
        query = select(table).where(table.c.analysis == self.analysis).order_by(table.c.latent)
        with self.engine.connect() as connection:
            found = pd.read_sql(query, connection)
        found = found.drop(columns="analysis").rename(columns={"latent": "index"})
        found = found.astype({name: float for name, kind in schema.FIGURES.items() if kind is Double})  # all NULL too
        return found.set_index("index", drop=False).rename_axis(None)

    def details(self, latent: int) -> dict[str, Any]:
        content = self.content(schema.details, "latent", latent)
        return {} if content is None else json.loads(zlib.decompress(content))

    def effects(self, latent: int) -> list[dict[str, Any]]:
        """Return the effects of a latent, one for each top example; [] if they were not measured."""
        content = self.content(schema.effects, "latent", latent)
        return [] if content is None else json.loads(zlib.decompress(content))

    def with_effects(self) -> set[int]:
        """Return the latents whose effects were measured."""
        table = schema.effects
        return {row.latent for row in self.rows(select(table.c.latent).where(table.c.analysis == self.analysis))}

    def examples(self, latent: int) -> Stored:
        content = self.content(schema.examples, "latent", latent)
        if content is None:
            raise IndexError(f"{self.url}: has no latent {latent}; there are {self.about['d_sae']:,}.")
        return from_bytes(content)

    def context(self, number: int) -> np.ndarray:
        """Return the token ids of a context that an example is in."""
        content = self.content(schema.contexts, "context", number)
        assert content is not None, f"context {number} is in no example"
        return np.frombuffer(content, dtype="<i4")

    def close(self) -> None:
        self.engine.dispose()


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"
