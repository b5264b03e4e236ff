"""Which of a machine's GPUs each of the processes on it uses."""

from __future__ import annotations

import pytest

from sae_training.parallel import ranks


@pytest.mark.parametrize(("there", "n_local", "expected"), [
    (8, 8, [[0], [1], [2], [3], [4], [5], [6], [7]]),
    (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (8, 3, [[0, 1], [2, 3], [4, 5]]),
    (2, 3, [[0], [1], []]),
    (0, 1, [[]]),
    (4, None, [[0], [1]]),  # of a launcher that does not say how many there are
])  # fmt: skip
def test_each_process_has_as_many(
    there: int, n_local: int | None, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda kind: there)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if n_local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_local))
    for number, own in enumerate(expected):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert [*ranks.own_gpus()] == own
