"""Bars of `datasets` are for terminals; a log file has none."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from sae_training.text import bars
from sae_training.text import open as opening
from sae_training.text.bars import bars_of_datasets
from sae_training.text.documents import Documents
from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents, save_tokenized


def lists_file(path: Path) -> Path:
    """Rows of several documents, which a mixture lays out one by one."""
    parquet.write_table(pa.table({"text": [[f"text {i}", "and more"] for i in range(20)]}), path)
    return path


def jsonl_file(folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(40)) + "\n")
    return path


def ids_of(texts: list[str]) -> list[list[int]]:
    return [[len(text)] for text in texts]


def read_and_save(folder: Path, streaming: bool) -> Documents:
    """All that shows bars: a large file into the Arrow cache, rows of a mixture, a copy and where it is saved."""
    documents = open_documents(jsonl_file(folder), streaming=streaming)
    save_tokenized(documents, ids_of, folder / "ids", n_processes=2)
    return open_mixture([lists_file(folder / f"{name}.parquet") for name in "ab"], streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["arrow", "streaming"])
def test_log_file_gets_no_bars(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "_PROGRESS_BAR_BYTES", 0)
    read_and_save(tmp_path, streaming)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_terminal_keeps_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "_PROGRESS_BAR_BYTES", 0)
    for module in (bars, opening):
        monkeypatch.setattr(module, "shows_bars", lambda: True)
    read_and_save(tmp_path, streaming=False)
    said = capfd.readouterr().err
    assert all(
        words in said for words in ("Generating train split", "tokenizing", "Saving the dataset", "reading rows")
    )


@pytest.mark.parametrize("is_off", [False, True])
def test_what_the_caller_has_turned_off_stays_off(is_off: bool) -> None:
    if is_off:
        datasets.disable_progress_bars()
    try:
        with bars_of_datasets():
            assert datasets.are_progress_bars_disabled()
        assert datasets.are_progress_bars_disabled() is is_off
    finally:
        datasets.enable_progress_bars()


def test_an_error_gives_the_bars_back() -> None:
    with pytest.raises(ValueError, match="broken"), bars_of_datasets():
        raise ValueError("broken")
    assert not datasets.are_progress_bars_disabled()
