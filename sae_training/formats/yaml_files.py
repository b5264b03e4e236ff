"""YAML files of other programs: read if they are small, plain and unambiguous, every value as the text that it is.

A full reader of YAML knows tags that build objects, references that grow without end, and numbers to the base 60 whose
digits take the square of their number. Configs here need names and texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MOST_BYTES = 2**18  # the largest seen has 10 KB; the reader in Python takes a second for 100 KB
DEEPEST = 20


def read_object(path: Path) -> dict[str, Any]:
    """The names and values in a file; lists and objects in them too. ValueError for anything else."""
    import yaml  # here, because an autoencoder needs nothing but torch and safetensors

    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: found {size:,} bytes, expected a config of at most {MOST_BYTES:,}; check the file.")
    try:
        text = path.read_bytes().decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # one after the other, as they are read
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("nested too deeply for a config")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ValueError("holds an anchor or alias (& or *), which can grow without end; write it out")
            if getattr(event, "tag", None) is not None:
                raise ValueError("holds a tag (!), which says how to build an object; leave it out")
        value = plain(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: no plain YAML ({error}); correct the file.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a {type(value).__name__}, expected names and values.")
    return value


def plain(node: Any) -> Any:
    """A node as dicts, lists and texts; None for null. ValueError for names that are repeated or no texts."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [plain(part) for part in node.value]
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if not isinstance(node, yaml.MappingNode):
        return None  # an empty file
    made: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError("a name that is no text")
        if key.value in made:
            raise ValueError(f"{key.value[:80]!r} is given more than once")
        made[key.value] = plain(value)
    return made
