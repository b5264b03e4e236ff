"""Makes the parts of the documentation that follow from the code; mkdocs calls it (`hooks` in mkdocs.yml).

`<!-- fields of CONFIG -->` in a page becomes tables of the fields of that config, with the text under each field.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import griffe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # because mkdocs runs this file by itself

from sae_training.cli import RECIPE  # noqa: E402
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig  # noqa: E402
from sae_training.config.checks import field_types  # noqa: E402
from sae_training.config.toy import SAEToyModelRunnerConfig  # noqa: E402
from sae_training.config.values import metavar  # noqa: E402

CONFIGS: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (LanguageModelSAERunnerConfig, CacheActivationsRunnerConfig, SAEToyModelRunnerConfig)
}


class Field(NamedTuple):
    """A field of a config as the documentation shows it."""

    name: str
    group: str
    """The comment above its part of the class; the class' first sentence where there is none."""
    text: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its tables; mkdocs calls this by its name."""
    return re.sub(r"<!-- fields of (\w+) -->", lambda found: tables(CONFIGS[found[1]]), markdown)


def tables(config: type[Any]) -> str:
    """Return a heading and a table for each group of fields of `config`, in the order in which a config has them."""
    types = field_types(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    recipe = RECIPE if config is LanguageModelSAERunnerConfig else {}
    lines: list[str] = []
    group = None
    for field in fields_of(config):
        if field.group != group:
            group = field.group
            lines += ["", f"### {group}", "", "| field | values | default | |", "|---|---|---|---|"]
        default = f"`{defaults[field.name]!r}`"
        if field.name in recipe and recipe[field.name] != defaults[field.name]:
            default += f"; command line `{recipe[field.name]!r}`"
        cells = (f"`{field.name}`", f"`{metavar(types[field.name]).replace('|', ' or ')}`", default, field.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def fields_of(config: type[Any]) -> list[Field]:
    """Return the fields that `config` and its bases state, in the order in which a config has them."""
    found: dict[str, Field] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        source, start = inspect.getsourcelines(cls)
        stated = griffe.load(cls.__module__, search_paths=[ROOT])[cls.__name__].members.values()  # none of a base's
        texts = {member.lineno: (member.name, member.docstring) for member in stated if member.is_attribute}
        group = (inspect.getdoc(cls) or cls.__name__).split(".")[0]
        for number, line in enumerate(source, start):
            if heading := re.fullmatch(r"    # (\w.*)\n", line):
                group = heading[1]
            name, text = texts.get(number, ("", None))
            if text is not None and name in field_types(config):
                first = found.get(name)  # a config that restates a field changes its text, not its place
                found[name] = Field(name, first.group if first else group, text.value)
    return list(found.values())
