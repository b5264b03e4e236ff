"""Tickets of detached jobs: before a job has a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_training import cli
from sae_training.jobs.detach import Wanted, claimed
from sae_training.jobs.found import jobs_in
from sae_training.run.record import Record

SINCE = "2026-01-31T12:00:00Z"


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", "a/b", "../x"])
def test_a_name_that_is_no_folder_deletes_nothing(name: str, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "precious"
    kept.mkdir(parents=True)
    with pytest.raises(ValueError, match="expected one that a folder can have"):
        claimed(Wanted("train", name, tmp_path / "runs", None), SINCE)
    assert kept.is_dir()


def test_a_ticket_of_a_job_elsewhere_stays(tmp_path: Path) -> None:
    runs, one, other = tmp_path / "runs", tmp_path / "one" / "acts", tmp_path / "other" / "acts"
    for folder, name in ((one, "acts"), (other, "acts-2"), (one, "acts")):
        ticket = claimed(Wanted("cache", "acts", runs, folder), SINCE)
        assert ticket == runs / ".detached" / name
        with Record(folder, "cache"):
            pass
        (ticket / ".holder.json").unlink()
        (ticket / "place.json").write_text(json.dumps({"folder": str(folder), "log_begins": 0}))
    assert {job.name: job.folder for job in jobs_in(runs)} == {"acts": one, "acts-2": other}
    with Record(one, "cache"), pytest.raises(OSError, match="is at work on it"):
        claimed(Wanted("cache", "acts", runs, one), SINCE)


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
