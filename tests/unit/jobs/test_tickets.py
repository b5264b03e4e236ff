"""Tickets of detached jobs: before a job has a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_training import cli
from sae_training.jobs.detach import Wanted, claimed

SINCE = "2026-01-31T12:00:00Z"


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", "a/b", "../x"])
def test_a_name_that_is_no_folder_deletes_nothing(name: str, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "precious"
    kept.mkdir(parents=True)
    with pytest.raises(ValueError, match="expected one that a folder can have"):
        claimed(Wanted("train", name, tmp_path / "runs", None), SINCE)
    assert kept.is_dir()


def test_a_job_is_called_as_its_folder_however_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "there" / "below"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    for words in (
        ["cache", "demo", "demo", "--device", "cpu", "--cached_activations_path", ".."],
        ["pretokenize", "demo", "demo", ".."],
    ):
        verb = cli.parse(words)
        assert isinstance(verb, cli.Detach)
        assert cli.job_of(verb).name == "there"
