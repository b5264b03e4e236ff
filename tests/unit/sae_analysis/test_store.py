"""Stores that are refused, and that reading one leaves it as it is."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from made_analysis import make_analysis
from sqlalchemy import insert
from sqlalchemy.exc import OperationalError

from sae_analysis.analysis import Analysis, open_analysis
from sae_analysis.export import export
from sae_analysis.store import schema
from sae_analysis.store.read import Reader, url_of
from sae_analysis.store.write import add_effect


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return make_analysis(tmp_path_factory.mktemp("made"), 12)


@pytest.fixture
def copy(analysis: Analysis, tmp_path: Path) -> Path:
    return Path(shutil.copy(analysis.reader.name, tmp_path / "copy.sqlite"))


def changed(sql: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.executescript(sql)
        connection.close()

    return change


def shortened(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def overwritten(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("update analyses set complete = 0"), "is unfinished; the same `build` command goes on"),
        (changed("update analyses set schema_version = 0"), "schema version 0, but .* reads 1; .*the version .*--anew"),
        (changed("update analyses set schema_version = 2"), "schema version 2, but .* reads 1; a newer version"),
        (
            changed("update analyses set schema_version = 0; alter table analyses drop column about"),
            "schema version 0, but",
        ),
        (changed("delete from analyses"), "holds no analysis number 1"),
        (changed("drop table analyses"), "no analysis that can be read .no such table: analyses.; .*--anew"),
        (shortened(0), "no analysis that can be read .no such table"),
        (shortened(1e-4), "no analysis that can be read"),
        (shortened(0.5), "no analysis that can be read .database disk image is malformed"),
        (shortened(0.95), "no analysis that can be read"),
        (overwritten(b"not a database" * 1000), "no analysis that can be read .file is not a database"),
        (overwritten(b"\x00" * 4096), "no analysis that can be read"),
    ],
)  # fmt: skip
def test_a_store_that_cannot_be_read_is_refused_by_name(
    copy: Path, change: Callable[[Path], None], message: str
) -> None:
    change(copy)
    before = copy.read_bytes()
    with pytest.raises(ValueError, match=f"copy.sqlite: .*{message}"):
        open_analysis(copy)
    assert copy.read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy.sqlite"]


def test_damage_that_shows_later_is_refused_too(copy: Path) -> None:
    changed("drop table pieces; drop table latents")(copy)
    opened = open_analysis(copy)
    with pytest.raises(ValueError, match=r"copy\.sqlite: .*no such table: latents"):
        _ = opened.latents
    with pytest.raises(ValueError, match=r"copy\.sqlite: .*no such table: pieces"):
        opened.token_text(0)


def test_reading_writes_nothing(copy: Path) -> None:
    before, stat = copy.read_bytes(), copy.stat()
    copy.chmod(0o444)
    copy.parent.chmod(0o555)
    try:
        opened = open_analysis(copy)
        opened.search(tokens="ocean")
        assert opened.latent(0).examples("top")
        assert len(opened.latents) == 12
        with pytest.raises(OperationalError, match="readonly"), opened.reader.engine.begin() as connection:
            connection.execute(insert(schema.effects), [{"analysis": 1, "latent": 0, "content": b""}])
        opened.reader.close()
        assert [path.name for path in copy.parent.iterdir()] == ["copy.sqlite"]
    finally:
        copy.parent.chmod(0o755)
    assert copy.read_bytes() == before and copy.stat().st_mtime_ns == stat.st_mtime_ns


def test_what_a_killed_writer_left_is_undone(copy: Path, tmp_path: Path) -> None:
    """A journal that lies beside the file holds what an unfinished transaction has overwritten."""
    (tmp_path / "killed").mkdir()
    killed = tmp_path / "killed" / copy.name
    connection = sqlite3.connect(copy, isolation_level=None)
    connection.execute("pragma cache_size = 2")  # so that pages are written before the end of the transaction
    connection.execute("begin")
    connection.execute("update latents set density = 0.5")
    connection.execute("update contexts set content = randomblob(2000)")
    for path in (copy, copy.with_name(copy.name + "-journal")):
        shutil.copy(path, tmp_path / "killed" / path.name)
    connection.close()
    assert open_analysis(killed).latents.equals(open_analysis(copy).latents)


def test_effects_are_added_to_a_finished_analysis(copy: Path) -> None:
    opened = open_analysis(copy)
    add_effect(opened.reader, 2, [{"loss": 0.5, "raised": [[0, 0.1]], "lowered": []}])
    assert opened.latent(2).effects[0].loss == 0.5
    assert opened.reader.with_effects() == {2, 7, 11}


@pytest.mark.parametrize("name", ["what?", "50%25 #1", "&mode=memory", "naïve 鲸", os.fsdecode(b"caf\xe9")])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    make_analysis(folder, 5)
    opened = open_analysis(folder)
    assert len(opened.latents) == 5
    assert str(folder) in opened.summary()
    assert export(opened, folder / "site").is_file()


def test_no_file_is_made_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unable to open database file"):
        open_analysis(url_of(tmp_path / "none.sqlite"))
    assert not any(tmp_path.iterdir())


def test_passwords_of_databases_are_not_shown() -> None:
    pytest.importorskip("psycopg", reason="no driver of PostgreSQL")
    with pytest.raises(ValueError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/none: .*holds no") as error:
        Reader("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(error.value)
