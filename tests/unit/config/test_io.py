from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from sae_training.config import CacheActivationsRunnerConfig
from sae_training.config import LanguageModelSAERunnerConfig as Config
from sae_training.config.checks import checked_names
from sae_training.config.fields import OPTION_OF, Source
from sae_training.config.files import read_config_values
from sae_training.config.io import (
    CACHE_FIELDS,
    FIELD_NAMES,
    WATCHING_FIELDS,
    config_differences,
    config_from_dict,
    config_to_dict,
    unknown_keys,
    with_defaults,
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
def test_an_object_has_the_defaults_of_fields_that_it_lacks(name: str, value: Any) -> None:
    assert getattr(with_defaults(SimpleNamespace(d_in=16)), name) == value


# ---------------------------------------------------------------------------------------------------- other objects


def test_run_config_is_left_as_it_is() -> None:
    cfg = Config(k=5)
    assert with_defaults(cfg) is cfg


def test_object_has_the_defaults_of_what_it_lacks() -> None:
    filled = with_defaults(SimpleNamespace(d_in=16, d_sae=48, k=[3], other=1))
    assert (filled.d_in, filled.d_sae, filled.k, filled.lr, filled.dtype) == (16, 48, [3], 3e-4, torch.float32)
    assert Config() == with_defaults(SimpleNamespace(d_in=512))


def test_width_is_not_guessed() -> None:
    assert with_defaults(SimpleNamespace(context_size=16)).d_in is None


def test_cache_gives_its_source_and_keeps_its_files_to_itself() -> None:
    cfg = CacheActivationsRunnerConfig(
        context_size=16, store_batch_size=4, hook_point="blocks.1.hook_z", device="cuda", dtype="int8", seed=3
    )
    filled = with_defaults(cfg)
    assert all(getattr(filled, f.name) == getattr(cfg, f.name) for f in dataclasses.fields(Source))
    assert (filled.device, filled.d_in, filled.eval_dataset_path) == ("cuda", None, None)
    assert (filled.use_cached_activations, filled.cached_activations_path) == (False, None)
    assert (filled.dtype, filled.seed) == (torch.float32, 42)


def test_marks_are_found_at_the_fields() -> None:
    assert {"context_size", "dataset_weights", "lm_dtype"} <= {*CACHE_FIELDS}
    assert not {"store_batch_size", "hook_point", "n_eval_batches"} & {*CACHE_FIELDS}
    assert OPTION_OF["multi_topk"] == ("topk",)


# ---------------------------------------------------------------------------------------------------- retired fields


@checked_names
@dataclass(kw_only=True)
class WithOldFields:
    RETIRED: ClassVar = {"old": "leave it out", "older": "use new"}
    new: int = 1


def test_retired_fields_are_dropped_with_one_warning_that_says_what_to_do() -> None:
    with pytest.warns(FutureWarning) as caught:
        assert WithOldFields(old=3, older=4, new=2).new == 2  # pyright: ignore
    (warning,) = caught
    assert str(warning.message).splitlines() == [
        "old: no longer a field of WithOldFields; leave it out",
        "older: no longer a field of WithOldFields; use new",
    ]


def test_retired_key_of_a_stored_run_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Source, "RETIRED", {"old": "leave it out"})
    assert unknown_keys({"old": 1, "k": 2, "other": 3}) == ["other"]
    with pytest.warns(FutureWarning, match="old: no longer a field of LanguageModelSAERunnerConfig"):
        assert config_from_dict({"old": 1, "k": 2}) == Config(k=2)
    (tmp_path / "cfg.yaml").write_text("old: 1\nk: 2\n")
    with pytest.warns(FutureWarning, match="old: no longer a field") as caught:
        assert read_config_values(tmp_path / "cfg.yaml") == {"k": 2}
    assert len(caught) == 1
    with pytest.warns(FutureWarning, match="old: no longer a field of CacheActivationsRunnerConfig"):
        CacheActivationsRunnerConfig(old=1)  # pyright: ignore


def test_tokenizer_processes_of_an_older_run_are_dropped() -> None:
    with pytest.warns(FutureWarning, match="tokenizer_processes: no longer a field"):
        assert config_from_dict({"tokenizer_processes": 4, "k": 2}) == Config(k=2)
