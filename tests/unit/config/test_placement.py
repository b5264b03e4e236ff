"""`device_map` and `load_in_8bit` as fields: what is read from text, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sae_training.cli import parse_train
from sae_training.config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from sae_training.config.placement import devices_of
from sae_training.config.values import read_value, written

PLAIN = {"model_processing": "none"}
HINT = str | dict[str, int | str] | None


def test_a_map_is_a_word_or_json() -> None:
    assert parse_train(["--device_map", "auto", "--model_processing=none"]).device_map == "auto"
    words = ["--device_map", '{"model.layers.0": 0, "": "cuda:1"}', "--load_in_8bit", "--model_processing=none"]
    cfg = parse_train([*words, "--device=cpu"])
    assert cfg.device_map == {"model.layers.0": 0, "": "cuda:1"}
    assert cfg.load_in_8bit is True
    assert read_value(written(cfg.device_map), HINT) == cfg.device_map
    with pytest.raises(ValueError, match="expected JSON .* double quotes"):
        read_value("{'': 0}", HINT)


@pytest.mark.parametrize(("fields", "line"), [
    ({"device_map": "gpus"}, "device_map: found 'gpus', expected one of auto, balanced, "),
    ({"device_map": {}}, "device_map: found an empty map, expected devices by the names of parts"),
    ({"device_map": {"": -1}}, "device_map: found -1 for '', expected the number of a GPU or one of cpu, "),
    ({"device_map": {"": 0.5}}, "device_map: found {'': 0.5} (dict), expected text or a dict whose values are each "),
    ({"device_map": {"model.norm": "disk"}}, "device_map: found 'disk' for 'model.norm', expected a device"),
    ({"device_map": {"a": "cpu", "b": 0}}, "device_map: found parts on cpu and on cuda:0, expected GPUs alone"),
    ({"device_map": "auto", "model_processing": "default"}, "device_map: found 'auto' with model_processing default"),
    ({"load_in_8bit": True, "model_processing": "default"}, "load_in_8bit: found True with model_processing default"),
], ids=range(8))  # fmt: skip
@pytest.mark.parametrize("cls", [LanguageModelSAERunnerConfig, CacheActivationsRunnerConfig])
def test_what_is_refused(cls: type[Any], fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        cls(**PLAIN | fields)
    assert str(caught.value).splitlines()[1].startswith(line)


def test_devices_that_a_map_names() -> None:
    assert devices_of("auto") == devices_of(None) == []
    assert devices_of("mps") == ["mps"]
    assert devices_of({"a": 0, "b": "cuda:0", "c": 1}) == ["cuda:0", "cuda:1"]
