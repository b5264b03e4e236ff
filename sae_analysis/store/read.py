"""Reading an analysis back from its tables."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from sqlalchemy import URL, Connection, Double, Engine, Select, Table, create_engine, event, make_url, select
from sqlalchemy.exc import DatabaseError

from sae_analysis.pieces import Texts
from sae_analysis.store import schema
from sae_analysis.store.example_blob import Stored, from_bytes

SQLITE = "sqlite:///"


def engine_of(url: str, only_reads: bool = False) -> Engine:
    """Return the engine of a database URL. `only_reads`: a SQLite file is neither made nor changed."""
    if not url.startswith(SQLITE):
        return create_engine(url)
    path = quote(os.fsencode(url.removeprefix(SQLITE)))  # which may hold a "?"
    query = {"mode": "rw" if only_reads else "rwc", "uri": "true"}  # not "ro", which cannot undo what a kill has left
    engine = create_engine(URL.create("sqlite", database=f"file:{path}", query=query))

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA query_only=ON" if only_reads else "PRAGMA synchronous=NORMAL")

    return engine


class Reader:
    """Reads the analysis number `analysis` of a database. ValueError if it is unfinished or of another schema."""

    def __init__(self, url: str, analysis: int = 1) -> None:
        self.engine, self.analysis, self.url = engine_of(url, only_reads=True), analysis, url
        self.name = shown(url)
        table = schema.analyses
        found = self.rows(select(table.c.schema_version).where(table.c.analysis == analysis))
        if not found:
            raise ValueError(f"{self.name}: holds no analysis number {analysis}.")
        check_version(self.name, found[0].schema_version)
        (row,) = self.rows(select(table).where(table.c.analysis == analysis))
        if not row.complete:
            raise ValueError(f"{self.name}: this analysis is unfinished; the same `build` command goes on with it.")
        self.about: dict[str, Any] = json.loads(row.about)

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """Give a connection. ValueError, naming the store, for what the database refuses: it is damaged, or none."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            advice = "; build it anew (`build --anew`)" if self.engine.dialect.name == "sqlite" else ""
            raise ValueError(f"{self.name}: holds no analysis that can be read ({error.orig}){advice}.") from error

    def rows(self, query: Select[*tuple[Any, ...]]) -> list[Any]:
        with self.connected() as connection:
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
        found = pd.DataFrame.from_records(self.rows(query), columns=table.columns.keys())
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
            raise IndexError(f"{self.name}: has no latent {latent}; there are {self.about['d_sae']:,}.")
        return from_bytes(content)

    def contexts(self, numbers: Iterable[int]) -> dict[int, np.ndarray]:
        """Return the token ids of contexts that examples are in, by number."""
        table = schema.contexts
        wanted = table.c.context.in_(sorted(set(numbers)))
        query = select(table.c.context, table.c.content).where(table.c.analysis == self.analysis, wanted)
        return {row.context: np.frombuffer(row.content, dtype="<i4") for row in self.rows(query)}

    def all_contexts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Give the number and the token ids of each context that an example is in."""
        table = schema.contexts
        query = select(table.c.context, table.c.content).where(table.c.analysis == self.analysis)
        with self.connected() as connection:
            for row in connection.execute(query.order_by(table.c.context)):
                yield row.context, np.frombuffer(row.content, dtype="<i4")

    def context(self, number: int) -> np.ndarray:
        return self.contexts([int(number)])[number]

    def close(self) -> None:
        self.engine.dispose()


def url_of(path: Path) -> str:
    return f"{SQLITE}{path}"


def path_of(url: str) -> Path | None:
    """Return the file of an SQLite database; None for another database."""
    return Path(url.removeprefix(SQLITE)) if url.startswith(SQLITE) else None


def shown(url: str) -> str:
    """Return what messages say of a database: the path of a file, a URL without its password."""
    return url.removeprefix(SQLITE) if url.startswith(SQLITE) else make_url(url).render_as_string(hide_password=True)


def check_version(name: str, found: int) -> None:
    """Raise ValueError, saying what to do, unless this version of the package reads the schema of a store."""
    if found == schema.SCHEMA_VERSION:
        return
    remedy = "read it with the version of the package that built it, or build it anew (`build --anew`)"
    if found > schema.SCHEMA_VERSION:
        remedy = "a newer version of the package built it: install that"
    raise ValueError(
        f"{name}: has schema version {found}, but this version of the package reads {schema.SCHEMA_VERSION}; {remedy}."
    )
