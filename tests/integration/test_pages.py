"""Commands and code in the pages: every block is run as a reader would, or the page says why it is not.

The line above a block of bash or python is `<!-- run -->` or `<!-- not run: why -->`. The blocks of a page are run in
their order, in one folder of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>run|not run: .+?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A block of a page; `mark` is what the line above it says, if it says anything."""

    line: int
    mark: str | None
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["mark"], found["language"], found["code"])
        for found in BLOCK.finditer(text)
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_whether_it_is_run(page: Path) -> None:
    silent = [block.line for block in blocks_of(page) if block.mark is None]
    assert not silent, f"{name(page)}: put <!-- run --> or <!-- not run: why --> above the blocks of lines {silent}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark == "run" for b in blocks_of(page))], ids=name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, tmux: None) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread, because as many pages as there are cores are run at a time.
    own = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
    }
    env = os.environ | own
    marked = [block for block in blocks_of(page) if block.mark == "run"]
    for language, group in groupby(marked, key=lambda block: block.language):
        blocks = list(group)
        code = "\n".join(block.code for block in blocks)  # neighbours share a session, as in a notebook
        words = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run([*words, code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (
            f"{name(page)}, line {blocks[0].line}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
