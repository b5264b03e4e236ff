"""docs/scale.md: its commands print what the page shows, and its arithmetic is theirs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sae_training.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```bash\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_has_its_output_on_the_page() -> None:
    assert len(BLOCKS) == PAGE.count("<!-- run -->") == 3


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=["8B", "70B cache", "70B"])
def test_a_command_prints_what_the_page_shows(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command.replace("\\\n", " "))
    assert program == "sae-training"
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in shown.splitlines():  # the page may leave lines out
        assert line in printed
        printed = printed[printed.index(line) + 1 :]


def test_the_steps_of_the_first_job_add_up() -> None:
    flops, bandwidth, rows, d_in, d_sae, k = 989e12 / 2, 3350e9 / 2, 16_384, 4096, 131_072, 64
    products = 4 * 2 * d_in * d_sae * rows / flops
    gathers = 4 * rows * (3 * d_sae + 4 * k * d_in) * 4 / bandwidth
    adam = 4 * 36 * (d_sae * (2 * d_in + 2) + d_in) / bandwidth
    assert [round(1000 * seconds) for seconds in (products, gathers, adam)] == [142, 226, 92]
    assert f"{1000 * (products + gathers + adam):.1f}" in BLOCKS[0][1]
    for part in ("= 142 ms", "= 226 ms", "= 92 ms"):
        assert part in PAGE


def test_the_bytes_of_the_second_job_add_up() -> None:
    ranks, rows, d_in, k = 128, 65_536, 8192, 128
    choice = (ranks - 1) * rows * k * 4
    reconstructions = 2 * (ranks - 1) / ranks * rows * d_in * 4
    assert [round(n / 1e9, 1) for n in (choice, reconstructions)] == [4.3, 4.3]
    assert f"{(choice + reconstructions) / 1e6:,.1f}" in BLOCKS[2][1]
    assert f"{1000 * (choice + reconstructions) / 25e9:.0f} ms" in PAGE
    # Of a checkpoint at 16 GB/s, and of its two files at those of SHA-256 and of a disk.
    assert round(3 * 2**40 / 16e9 / 60, 1) == 3.4
    assert [round(n * 2**40 / rate / 60) for rate in (1.5e9, 1e9) for n in (1, 2)] == [12, 24, 18, 37]
    read = rows * d_in * 2
    assert f"{1000 * read / 1e9:,.1f}" in BLOCKS[2][1] and f"{1000 * read / 1e9:,.0f} ms" in PAGE
