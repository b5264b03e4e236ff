"""The tables of fields that the documentation's site builds."""

from __future__ import annotations

import dataclasses

import pytest

from scripts.docs_site import CONFIGS, on_page_markdown


def rows(config: str) -> dict[str, list[str]]:
    page = on_page_markdown(f"# Title\n\n<!-- fields of {config} -->\n")
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_one_row_with_a_text(config: str) -> None:
    names = [field.name for field in dataclasses.fields(CONFIGS[config])]
    found = rows(config)
    assert sorted(found) == sorted(names)
    assert all(len(row) == 3 and row[2].endswith(".") for row in found.values())


def test_a_row_says_values_default_and_what_the_command_line_starts_from() -> None:
    found = rows("LanguageModelSAERunnerConfig")
    text = "Learning rate; auto is the rule that we measured to be best, by d_sae and steps."
    assert found["lr"] == ["`{auto} or FLOAT[,...]`", "`0.0003`; command line `'auto'`", text]
    assert found["context_size"][1] == "`128`"


def test_a_config_that_restates_a_field_has_its_own_text() -> None:
    assert rows("SAEToyModelRunnerConfig")["lr"] != rows("LanguageModelSAERunnerConfig")["lr"]
