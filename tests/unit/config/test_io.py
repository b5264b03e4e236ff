from __future__ import annotations

import json
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
    option,
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
