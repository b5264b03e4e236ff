"""A store in PostgreSQL holds what one in SQLite does. Runs where a server and a driver (psycopg) are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_analysis import make_analysis
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import OperationalError

from sae_analysis import build, build_analysis, open_analysis
from sae_analysis.analysis import Analysis
from sae_analysis.export import export
from sae_analysis.store import schema, write
from sae_analysis.store.read import Reader, engine_of
from sae_analysis.store.write import Writer, add_effect
from sae_training.lm_runner import run_config

pytest.importorskip("psycopg", reason="no driver of PostgreSQL")
DEBIAN = Path("/usr/lib/postgresql")  # has a folder of each version, which is not on the path
PROGRAMS = os.pathsep.join([os.environ["PATH"], *map(str, sorted(DEBIAN.glob("*/bin")))])
INITDB, POSTGRES = (shutil.which(name, path=PROGRAMS) for name in ("initdb", "postgres"))
pytestmark = pytest.mark.skipif(INITDB is None or POSTGRES is None, reason="no PostgreSQL on this machine")
PATIENCE = 60.0  # seconds


def server_user() -> str | None:
    """Return the user whom a server runs as: it refuses root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The URL of an empty database, on a server that listens in a folder only."""
    assert INITDB is not None and POSTGRES is not None
    user = server_user()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the address of a socket is 107 letters at most
        if user is not None:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        subprocess.run([INITDB, "-D", data, "-U", "me", "-A", "trust", "-E", "UTF8"], user=user, cwd="/", check=True)
        words = [POSTGRES, "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen(words, user=user, cwd="/")
        try:
            address = f"postgresql+psycopg://me@/postgres?host={folder}"
            wait_for(address, process)
            yield address
        finally:
            process.send_signal(signal.SIGINT)  # ends connections too
            process.wait(PATIENCE)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, "the server ended"
        try:
            return engine_of(url).connect().close()
        except OperationalError:
            assert time.monotonic() < ends
            time.sleep(0.1)


def content(engine: Engine, analysis: int = 1) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of an analysis, without its number."""
    found = {}
    with engine.connect() as connection:
        for table in schema.metadata.sorted_tables:
            rows = connection.execute(select(table).where(table.c.analysis == analysis)).all()
            found[table.name] = sorted(tuple(row)[1:] for row in rows)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_exports(one: Analysis, other: Analysis, folder: Path) -> None:
    for form in ("site", "parquet", "jsonl", "neuronpedia"):
        for name, analysis in (("one", one), ("other", other)):
            export(analysis, folder / name / form, form)
    assert files(folder / "one") == files(folder / "other")


def test_a_build_writes_the_same_into_both(
    url: str, small_config: Callable[..., Any], demo_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Both(Writer):
        """Writes to PostgreSQL what it writes to a file; there in two goes, the first of which is cut off."""

        def write(self, *what: Any) -> None:
            super().write(*what)
            with monkeypatch.context() as patch:
                patch.setattr(write, "context_rows", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    Writer(url, 1, self.about).write(*what)
            with pytest.raises(ValueError, match="is unfinished"):
                Reader(url)
            Writer(url, 1, self.about).write(*what)

    monkeypatch.setattr(build, "Writer", Both)
    run = run_config(small_config(architecture="topk", k=8), demo_model).folder.path
    one = build_analysis(run, 1_000)
    assert isinstance(one, Analysis)
    other = open_analysis(url)
    assert content(one.reader.engine) == content(other.reader.engine)
    assert one.latents.equals(other.latents)
    assert one.latents.dtypes.tolist() == other.latents.dtypes.tolist()
    for analysis in (one, other):
        add_effect(analysis.reader, 3, [{"loss": 0.5, "raised": [], "lowered": []}])
    assert one.latent(3).effects == other.latent(3).effects != []
    assert one.search(tokens="the").equals(other.search(tokens="the"))


def test_hostile_texts_are_the_same_in_both(url: str, tmp_path: Path) -> None:
    """As the second analysis of a database."""
    one = make_analysis(tmp_path / "made", 12)
    engine = engine_of(url)
    schema.metadata.create_all(engine)
    with engine.begin() as connection, one.reader.engine.connect() as rows:
        for table in schema.metadata.sorted_tables:
            found = [{**row, "analysis": 2} for row in rows.execute(select(table)).mappings()]
            connection.execute(insert(table), found)
    other = Analysis(Reader(url, 2))
    assert content(one.reader.engine) == content(engine, 2)
    same_exports(one, other, tmp_path)
    with pytest.raises(ValueError, match="holds no analysis number 3"):
        Reader(url, 3)
