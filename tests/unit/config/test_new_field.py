"""The fields that docs/architecture.md adds as an example: each is written once, and everything else follows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLACES = {
    "warm_restarts": "Optimisation",
    "progress_every": "Records",
    "lowercase": "Source",
    "gate_bias": "Autoencoder",
}

USES = """
import contextlib, dataclasses, io, json
from sae_training import cli
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig as Config
from sae_training.config.checks import fields_marked
from sae_training.config.io import config_from_dict, config_to_dict
from sae_training.config.toy import SAEToyModelRunnerConfig
from sae_training.config.types import IDENTIFIES_CACHE, WATCHES

cfg = Config(warm_restarts=3, progress_every=5, lowercase=True)
assert config_from_dict(json.loads(json.dumps(config_to_dict(cfg)))) == cfg
old = {name: value for name, value in config_to_dict(Config()).items() if name not in ("warm_restarts", "gate_bias")}
assert config_from_dict(old) == Config()
assert "progress_every" in fields_marked(Config, WATCHES) and "warm_restarts" not in fields_marked(Config, WATCHES)
assert "lowercase" in fields_marked(Config, IDENTIFIES_CACHE)
assert CacheActivationsRunnerConfig(lowercase=True).lowercase and SAEToyModelRunnerConfig(warm_restarts=1).warm_restarts
assert Config(architecture="gated", gate_bias=0.5).gate_bias == 0.5
for wrong, message in (
    ({"warm_restarts": 0}, "warm_restarts: found 0, expected more than 0"),
    ({"progress_every": "often"}, "progress_every: found 'often'"),
    ({"architecture": "topk", "gate_bias": 0.5}, "gate_bias"),
):
    try:
        Config(**wrong)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(wrong)
shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    cli.main(["train", "--help"])
for text in ("--warm-restarts", "Restarts of the optimizer", "--lowercase", "--gate-bias"):
    assert text in shown.getvalue(), text
"""


def test_a_new_field_is_written_in_one_place(tmp_path: Path) -> None:
    example = re.search(r"### Adding a config field.*?```python\n(.*?)```", architecture(), re.DOTALL)
    assert example is not None
    fields = {re.search(r"^(\w+):", part, re.MULTILINE)[1]: part for part in example[1].strip().split("\n\n")}  # pyright: ignore[reportOptionalSubscript]
    assert fields.keys() == PLACES.keys()

    package = tmp_path / "sae_training"
    (package / "config").mkdir(parents=True)
    for path in (ROOT / "sae_training").iterdir():
        if path.name not in ("config", "__pycache__"):
            (package / path.name).symlink_to(path)
    for path in (ROOT / "sae_training" / "config").glob("*.py"):
        text = path.read_text()
        for name, group in PLACES.items() if path.name == "fields.py" else ():
            body = "\n".join(f"    {line}" for line in fields[name].splitlines())
            text, n = re.subn(rf'(class {group}:\n    """.*?"""\n)', rf"\1\n{body}\n", text, count=1, flags=re.DOTALL)
            assert n == 1
        (package / "config" / path.name).write_text(text)

    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", USES], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def architecture() -> str:
    return (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="makes symbolic links")
