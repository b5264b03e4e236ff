from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.io import (
    FIELD_NAMES,
    WATCHING_FIELDS,
    config_differences,
    config_from_dict,
    config_to_dict,
    load_config,
    option,
    save_config,
    unknown_keys,
)

UNUSUAL = Config(
    architecture="topk",
    d_in=None,
    lr=8e-5,
    lr_warm_up_steps="auto",
    dtype=torch.bfloat16,
    device=torch.device("cuda", 1),  # pyright: ignore
    hook_point_head_index=3,
    checkpoint_every_minutes=0.5,
    run_name="1e-4",
    dataset_path=["a.jsonl", "owner/b"],
    dataset_weights=(0.7, 0.3),
    sequence_separator_token=5,
)


def test_dict_is_json_safe_and_names_the_dtype() -> None:
    values = config_to_dict(UNUSUAL)
    assert values["dtype"] == "bfloat16"
    assert values["device"] == "cuda:1"
    assert values["matryoshka_widths"] == []
    assert json.loads(json.dumps(values)) == values


def test_dict_has_every_field_in_order() -> None:
    assert tuple(config_to_dict(Config())) == FIELD_NAMES


def test_dict_round_trip() -> None:
    assert config_from_dict(config_to_dict(UNUSUAL)) == UNUSUAL


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_file_round_trip(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"cfg.{ending}"
    save_config(UNUSUAL, path)
    assert load_config(path) == UNUSUAL


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), ("+4e-05", 4e-5), ("0.0001", 1e-4)],
)
def test_yaml_reads_every_spelling_of_a_number(text: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text(f"lr: {text}\ntotal_training_tokens: 2e6\n")
    cfg = load_config(path)
    assert (cfg.lr, cfg.total_training_tokens) == (value, 2_000_000)


def test_empty_yaml_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text("# nothing yet\n")
    assert load_config(path) == Config()


def test_unknown_keys_are_named_all_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        config_from_dict({"k": 4, "l1_coef": 1, "expansion_facto": 2})
    assert str(caught.value).splitlines() == [
        "l1_coef: not a field of the config; did you mean 'l1_coefficient'?",
        "expansion_facto: not a field of the config; did you mean 'expansion_factor'?",
    ]


def test_unknown_keys_of_a_foreign_file_are_dropped_and_listed() -> None:
    values = {"k": 4, "sae_lens_version": "6"}
    assert config_from_dict(values, strict=False) == Config(k=4)
    assert unknown_keys(values) == ["sae_lens_version"]


def test_known_keys_of_a_foreign_file_are_still_checked() -> None:
    with pytest.raises(ValueError, match="k: found 0, expected more than 0"):
        config_from_dict({"k": 0, "other": 1}, strict=False)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("cfg.yaml", "k: 0\n", "k: found 0, expected more than 0"),
        ("cfg.yaml", "kk: 1\n", "kk: not a field of the config"),
        ("cfg.yaml", "k: [1\n", "correct the file"),
        ("cfg.json", "{", "correct the file"),
        ("cfg.json", "[1]", "found a list, expected lines of `field: value`"),
        ("cfg.toml", "k = 1", "found the ending '.toml', expected .yaml, .yml or .json"),
    ],
    ids=["value", "field", "yaml", "json", "list", "ending"],
)
def test_wrong_file_is_named_in_the_error(name: str, text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) <= 2  # yaml names the stream itself
    assert error in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text(f"k: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        load_config(path)
    assert not (tmp_path / "made").exists()


def test_differences_give_both_values() -> None:
    a = Config(k=4, device="cuda", dtype=torch.float32)
    b = Config(k=8, device="cpu", dtype=torch.float64)
    assert config_differences(a, b, ignore={"device"}) == {
        "k": (4, 8),
        "dtype": ("float32", "float64"),
    }


def test_equal_configs_have_no_differences() -> None:
    assert config_differences(Config(lr=1), Config(lr=1.0)) == {}


def test_watching_fields_are_fields_and_leave_out_what_trains() -> None:
    assert set(FIELD_NAMES) >= WATCHING_FIELDS
    assert {name for name in FIELD_NAMES if "wandb" in name} <= WATCHING_FIELDS
    assert not WATCHING_FIELDS & {"n_eval_batches", "seed", "dtype", "store_batch_size", "lr"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("d_in", 16), ("architecture", "standard"), ("dtype", torch.float32), ("auxk_k", None)],
)
def test_option_falls_back_to_the_default(name: str, value: Any) -> None:
    assert option(SimpleNamespace(d_in=16), name) == value


def test_option_knows_only_fields() -> None:
    with pytest.raises(AttributeError, match="did you mean 'expansion_factor'?"):
        option(Config(), "expansion_factors")
