"""The shape of the package: sizes of files and functions, imports, and the map in docs/architecture.md.

Which folder may import which is import-linter's part (`make lint`).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("sae_training", "sae_analysis")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 65


def names_of(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_the_packages_are_found() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=names_of(FILES))
def test_a_file_and_its_functions_are_short_and_import_nothing_of_ours_for_types_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MOST_LINES_OF_A_FUNCTION, node.name
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            ours = [name for name in imported_names(node) if name.split(".")[0] in PACKAGES]
            assert not ours, f"line {node.lineno} imports {ours} under TYPE_CHECKING"


def imported_names(node: ast.AST) -> list[str]:
    found: list[str] = []
    for part in ast.walk(node):
        if isinstance(part, ast.ImportFrom):
            found.append(part.module or "")
        elif isinstance(part, ast.Import):
            found += [alias.name for alias in part.names]
    return found


def test_the_map_names_every_file_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^\| `([^`]+)` \|", text[text.index("## The map") :], re.MULTILINE))
    present = {
        path.relative_to(ROOT / package).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in SOURCE_SUFFIXES
    }
    assert mapped <= present
    assert not {name for name in present - mapped if not name.endswith("__init__.py")}


def test_no_page_holds_a_placeholder() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert not [page.name for page in pages if "@@" in page.read_text(encoding="utf-8")]


SOURCE_SUFFIXES = (".py", ".cpp", ".j2", ".css", ".js")
