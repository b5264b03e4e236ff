"""What a run began with: its threads come back when it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sae_training.run.environment import read_environment, threads_of, write_environment


def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        write_environment(tmp_path)
        torch.set_num_threads(1)
        write_environment(tmp_path)  # as the second start does, which must not change what the first one wrote
        with threads_of(tmp_path):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
        assert "Threads: 3, as the run began with" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("content", ["", "[]", '{"threads": 3}', '{"threads": 0, "processes": 1}'])
def test_a_file_that_says_nothing_changes_nothing(content: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    (tmp_path / "environment.json").write_text(content)
    with threads_of(tmp_path):
        assert torch.get_num_threads() == before


def test_a_run_of_other_processes_keeps_its_own_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    write_environment(tmp_path)
    facts = read_environment(tmp_path) | {"processes": 2, "threads": before + 1}
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    with threads_of(tmp_path):
        assert torch.get_num_threads() == before
