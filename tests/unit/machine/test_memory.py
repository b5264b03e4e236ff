"""What the machine has for a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_training.machine import memory


def test_the_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("123456789\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "no-such-file"), str(limit)))
    assert memory.limit_of_container() == 123456789
    limit.write_text("max\n")
    assert memory.limit_of_container() == float("inf")
