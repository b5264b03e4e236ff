"""Config files: YAML and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.files import read_config_values
from sae_training.config.io import config_from_dict, config_to_dict

UNUSUAL = Config(
    architecture="topk",
    d_in=None,
    lr=8e-5,
    lr_warm_up_steps="auto",
    dtype=torch.bfloat16,
    hook_point_head_index=3,
    checkpoint_every_minutes=0.5,
    run_name="1e-4",
    dataset_path=["a.jsonl", "owner/b"],
    dataset_weights=(0.7, 0.3),
    sequence_separator_token=5,
)


def config_in(path: Path, text: str) -> Config:
    path.write_text(text)
    return config_from_dict(read_config_values(path))


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_file_of_a_whole_config_is_that_config(ending: str, tmp_path: Path) -> None:
    # JSON is YAML too
    assert config_in(tmp_path / f"cfg.{ending}", json.dumps(config_to_dict(UNUSUAL), indent=2)) == UNUSUAL


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), ("+4e-05", 4e-5), ("0.0001", 1e-4)],
)
def test_yaml_reads_every_spelling_of_a_number(text: str, value: float, tmp_path: Path) -> None:
    cfg = config_in(tmp_path / "cfg.yaml", f"lr: {text}\ntotal_training_tokens: 2e6\n")
    assert (cfg.lr, cfg.total_training_tokens) == (value, 2_000_000)


def test_quotes_keep_a_number_in_yaml_text(tmp_path: Path) -> None:
    assert config_in(tmp_path / "cfg.yaml", "run_name: '1e-4'\n").run_name == "1e-4"


def test_empty_yaml_is_the_defaults(tmp_path: Path) -> None:
    assert config_in(tmp_path / "cfg.yaml", "# nothing yet\n") == Config()


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("cfg.yaml", "kk: 1\n", "kk: not a field of the config"),
        ("cfg.yaml", "k: [1\n", "correct the file"),
        ("cfg.json", "{", "correct the file"),
        ("cfg.json", "[1]", "found a list, expected lines of `field: value`"),
        ("cfg.toml", "k = 1", "found the ending '.toml', expected .yaml, .yml or .json"),
    ],
    ids=["field", "yaml", "json", "list", "ending"],
)
def test_wrong_file_is_named_in_the_error(name: str, text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError) as caught:
        config_in(path, text)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) <= 2  # yaml names the stream itself
    assert error in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.yaml: no such config file"):
        read_config_values(tmp_path / "none.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not determine a constructor"):
        config_in(tmp_path / "cfg.yaml", f"k: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert not (tmp_path / "made").exists()


def test_only_config_files_need_yaml() -> None:
    code = "import sae_training.config.io, sae_training.config.toy, sys; print({'yaml', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
